"""Build the stock model of a config on the meta device, change one number at a time, see which sizes move.

Sizes of one model cannot tell two axes of equal size apart; what moves when a single number changes can. Nothing is
downloaded, no weights exist, and no code of a checkpoint runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from minitron_cli.errors import CheckpointError, FamilyError, ShapeError
from minitron_cli.families.expression import parse, size
from minitron_cli.families.schema import Family
from minitron_cli.models.load import stock_config
from minitron_cli.shape import Shape

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Observation:
    """What the stock class makes of one config: the tensors it would save."""

    change: str
    config: Config
    shapes: Shapes


@dataclass(frozen=True)
class Probe:
    """A base, what single changes of its config did, and which changes the stock class or the layout refused.

    `seen` names the config keys that were changed in at least one observation.
    """

    base: Observation
    changes: tuple[Observation, ...]
    seen: frozenset[str]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def observations(self) -> tuple[Observation, ...]:
        return (self.base, *self.changes)


def build(config: Config, **options: Any) -> Any:
    """The stock causal LM of a config on the meta device.

    Raises:
        CheckpointError: transformers does not know the type, has no causal LM for it, or refuses the config.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers has no model type {model_type!r}, so there is no stock model to learn the family from."
        )
    with _silence():
        stock = stock_config(dict(config))
    if type(stock) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        inner = "; give the config of its text part" if "text_config" in config else ""
        raise CheckpointError(f"transformers has no causal LM class for model_type {model_type!r}{inner}.")
    try:
        with _silence(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(stock, **options)
    except Exception as error:  # model constructors raise what they like: assertions, index and value errors
        raise CheckpointError(f"transformers cannot build this {model_type} model: {error or type(error)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """What transformers logs about a config it refuses is an answer here, not a problem of the user's."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Name on disk to meta tensor: tied tensors once, stacked experts taken apart, as `save_pretrained` does."""
    from transformers.core_model_loading import revert_weight_conversion

    copies = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: each for name, each in model.state_dict(keep_vars=True).items() if name not in copies}
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return saved


def stock_values(config: Config) -> dict[str, Any]:
    """The config as the stock class completes it: what it would write to config.json, every default spelt out."""
    values: dict[str, Any] = build(config).config.to_dict()
    return {**values, "model_type": config["model_type"]}


def observe(config: Config, change: str = "") -> Observation:
    """What the stock class makes of `config`.

    Raises:
        CheckpointError: it refuses the config.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(build(config)).items()}
    return Observation(change, config, shapes)


def alternatives(value: int) -> Iterator[int]:
    """Other values to try for a number, those first that keep what divided or was divisible."""
    for other in (2 * value, 3 * value, value // 2, value // 3, value + 1, value - 1, value + 2, value + 8):
        if other > 0 and other != value:
            yield other


def with_number(config: Config, key: str, value: int) -> Iterator[dict[str, Any]]:
    """The config with one number changed; then with per-layer lists refitted, and with its equals changed along."""
    old = config[key]
    yield {**config, key: value}
    lists = {name: each for name, each in config.items() if isinstance(each, list | tuple) and len(each) == old}
    if lists:
        refitted = {name: [each[place % old] for place in range(value)] for name, each in lists.items()}
        yield {**config, **refitted, key: value}
    for name, each in config.items():
        if name != key and type(each) is int and each == old > 2:
            yield {**config, key: value, name: value}


def numbers(config: Config) -> list[str]:
    """The keys that hold whole numbers."""
    return [key for key, value in config.items() if type(value) is int]


def switches(config: Config) -> list[str]:
    """The keys that hold true or false."""
    return [key for key, value in config.items() if type(value) is bool]


def probe(config: Config, accept: Callable[[Observation], bool], *, flips: bool = True) -> Probe:
    """Change every number (and flip every switch) of a config once, in the first way that `accept` takes.

    Raises:
        CheckpointError: the stock class refuses the config itself.
    """
    base = observe(config)
    changes, seen, skipped = [], set(), {}
    for key in numbers(config):
        found, reason = _first_accepted(_number_changes(config, key), accept)
        if found is None:
            skipped[key] = reason
        else:
            changes.append(found)
            seen.add(key)
    for key in switches(config) if flips else ():
        found, reason = _first_accepted([(f"{key}={not config[key]}", {**config, key: not config[key]})], accept)
        if found is None:
            skipped[key] = reason
        else:
            changes.append(found)
            seen.add(key)
    return Probe(base, tuple(changes), frozenset(seen), skipped)


def _number_changes(config: Config, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for value in alternatives(config[key]):
        for changed in with_number(config, key, value):
            yield f"{key}={value}", changed


def _first_accepted(
    candidates: Iterator[tuple[str, dict[str, Any]]] | list[tuple[str, dict[str, Any]]],
    accept: Callable[[Observation], bool],
) -> tuple[Observation | None, str]:
    reason = "no other value"
    for change, config in candidates:
        try:
            seen = observe(config, change)
        except CheckpointError as error:
            reason = str(error)
            continue
        if accept(seen):
            return seen, ""
        reason = "another layout"
    return None, reason


@dataclass(frozen=True)
class CrossCheck:
    """How a family's declarations fare against the stock class, over all changes of a config."""

    disagreements: tuple[str, ...]
    seen: frozenset[str]
    skipped: Mapping[str, str]


def cross_check(family: Family, config: Config) -> CrossCheck:
    """Compare what a family declares with what the stock class builds, under every change the family answers for.

    Raises:
        CheckpointError: the stock class refuses the config.
    """
    found = probe(stock_values(config), lambda seen: _within(family, seen.config))
    disagreements = tuple(line for seen in found.observations for line in differences(family, seen))
    return CrossCheck(disagreements, found.seen, found.skipped)


def _within(family: Family, config: Config) -> bool:
    """Whether the family answers for a config, and its own rules allow the sizes."""
    try:
        sizes = family.sizes(config)
        rules = Shape(family, config, sizes).rules
        allowed = all(sizes[rule.axis] % _divisor(rule.divisor, sizes) == 0 for rule in rules)
        coupled = all(sizes[axis] == size(parse(text), sizes) for axis, text in family.coupled.items())
        family.layer_tags(config, sizes["layers"])
    except (FamilyError, ShapeError, ZeroDivisionError):
        return False
    return allowed and coupled and family.answers_for(config)


def _divisor(text: str, sizes: Mapping[str, int]) -> int:
    return int(text) if text.isdigit() else size(parse(text), sizes)


def differences(family: Family, seen: Observation) -> list[str]:
    """Tensors that a family declares otherwise than the stock class builds them."""
    sizes = family.sizes(seen.config)
    declared = {name: family.tensor_shape(tensor, sizes) for name, tensor, _ in family.expected(seen.config)}
    where = f" with {seen.change}" if seen.change else ""
    return [
        f"{name}{where}: declared {declared.get(name)}, the stock class has {seen.shapes.get(name)}"
        for name in sorted(declared.keys() | seen.shapes.keys())
        if declared.get(name) != seen.shapes.get(name)
    ]
