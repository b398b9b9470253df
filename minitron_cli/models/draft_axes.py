"""Which config keys are axes, what the stock class takes for absent ones, and how large each axis is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_cli.errors import CheckpointError
from minitron_cli.families.reading import formula
from minitron_cli.families.schema import Axis
from minitron_cli.models.draft_probe import Config, Observation, Probe, Shapes, observe, probe
from minitron_cli.models.draft_trace import trace
from minitron_cli.models.load import stock_config

COMMON_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
}
"""Axis name to the keys that config classes commonly give it; a key of no list keeps its own name."""

CUTTABLE = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "experts", "expert_ffn", "shared_ffn")
PER_LAYER = ("ffn", "kv_heads", "experts", "expert_ffn", "shared_ffn")
FORMULAS = ("heads", "hidden", "hidden // heads", "4 * hidden", "head_dim")
"""What stock classes compute from null, tried in this order."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pattern_of(name: str) -> tuple[str, tuple[int, ...]]:
    """`model.layers.3.mlp.experts.5.w` as `model.layers.{layer}.mlp.experts.{expert}.w` and (3, 5)."""
    indices = tuple(int(each) for each in _NUMBER.findall(name))
    words = iter(("{layer}", "{expert}"))
    return _NUMBER.sub(lambda match: next(words, match.group()), name), indices


def patterns(shapes: Shapes) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Pattern to (indices, shape) of every tensor it covers."""
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        pattern, indices = pattern_of(name)
        found.setdefault(pattern, []).append((indices, shape))
    return found


def axis_names(config: Config) -> dict[str, str]:
    """Config key to axis name."""
    stock = stock_config(dict(config))
    names = {key: axis for axis, keys in COMMON_KEYS.items() for key in keys}
    for common, own in getattr(stock, "attribute_map", {}).items():
        names.setdefault(own, names.get(common, own))
    return names


@dataclass
class Axes:
    """The axes of a layout: config keys that move sizes, and those derived from them."""

    keys: dict[str, str]
    """Axis name to config key."""
    defaults: dict[str, str | int] = field(default_factory=dict)
    """Axis name to what the stock class computes where the key is absent or null."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Config key to the stock class's field default."""
    equal: dict[str, str] = field(default_factory=dict)
    """Config key to the axis it can only change together with."""

    @property
    def derives_head_dim(self) -> bool:
        return "head_dim" not in self.keys and {"hidden", "heads"} <= self.keys.keys()

    def sizes(self, config: Config) -> dict[str, int]:
        """Every axis of the fit (layers and derived copies left out) under one config."""
        sizes = {axis: int(config[key]) for axis, key in self.keys.items() if axis != "layers"}
        if self.derives_head_dim:
            sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        return sizes

    def declared(self, used: set[str]) -> tuple[Axis, ...]:
        """The axes as a family file declares them; `used` are those that dimensions name."""
        found = [self._keyed(axis, key) for axis, key in self.keys.items()]
        if self.derives_head_dim:
            found.append(Axis("head_dim", default="hidden // heads", prunable=True))
        if "kv_heads" in self.keys:
            found.append(Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True))
        elif "heads" in self.keys:
            # One KV head per query head, unless a dimension says otherwise: they leave together.
            found.append(Axis("kv_heads", default="heads", prunable=True))
        if "v_head_dim" in used and "v_head_dim" not in self.keys:
            within = "kv_heads" if "kv_heads" in self.keys else "heads"
            found.append(Axis("v_head_dim", default="head_dim", within=within, per_layer=True))
        return tuple(found)

    def _keyed(self, axis: str, key: str) -> Axis:
        why = "" if axis in CUTTABLE else "CHECK: may its units be cut?"
        why = "the tokenizer decides it" if axis == "vocab" else why
        within = "experts" if axis == "expert_ffn" and "experts" in self.keys else ""
        per_layer = not why and axis in PER_LAYER
        return Axis(
            axis, key, self.defaults.get(axis), prunable=not why, why_not=why, within=within, per_layer=per_layer
        )


def same_layout(base: Observation) -> Any:
    """Accepts observations with the same tensors as `base`, any number of layers and experts."""
    known = patterns(base.shapes).keys()
    return lambda seen: patterns(seen.shapes).keys() == known


def open_nulls(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, str | int]]]:
    """Give a number to null keys that are sizes: the new config, and what null stood for, by key.

    `head_dim` is tried even where the config class does not name it: many read it all the same.
    """
    base, opened = observe(values), {}
    names = axis_names(values)
    runs = bool(trace(values))
    for key in [key for key, value in {"head_dim": None, **values}.items() if value is None]:
        for trial in (24, 16, 8):
            try:
                seen = observe({**values, key: trial})
            except CheckpointError:
                continue
            if seen.shapes != base.shapes and same_layout(base)(seen):
                implied = _implied(base.shapes, seen.shapes, trial, values, names)
                # Some classes build what then cannot run: they read the key in one place and not in another.
                if implied is not None and (not runs or trace({**values, key: trial})):
                    opened[key] = (trial, implied)
                break
    return {**values, **{key: trial for key, (trial, _) in opened.items()}}, opened


def _implied(old: Shapes, new: Shapes, trial: int, values: Config, names: Mapping[str, str]) -> str | int | None:
    """What null meant, from dimensions that became the trial value or a multiple of it."""
    sizes = {names[key]: value for key, value in values.items() if key in names and type(value) is int}
    for name, shape in new.items():
        for was, now in zip(old[name], shape, strict=True):
            if was != now and now % trial == 0 and was % (now // trial) == 0:
                return as_formula(was // (now // trial), sizes)
    return None


def as_formula(value: int, sizes: Mapping[str, int]) -> str | int:
    """A value as a formula of other axes where one gives it, else as a number."""
    for text in FORMULAS:
        try:
            if formula(text, sizes) == value:
                return text
        except KeyError:
            continue
    return value


def find_axes(found: Probe, opened: Mapping[str, tuple[Any, str | int]], given: Config) -> Axes:
    """The keys that moved sizes or counts in `found`, with their defaults."""
    names = axis_names(found.base.config)
    axes = Axes({})
    for seen in found.changes:
        changed = [key for key, value in seen.config.items() if type(value) is int and value != found.base.config[key]]
        key = seen.change.partition("=")[0]
        heads = names.get(key) == "heads"
        if seen.shapes == found.base.shapes and not heads:
            continue
        partner = next((axis for axis, own in axes.keys.items() if own in changed and own != key), None)
        if partner is not None:
            axes.equal[key] = partner
            continue
        axes.keys[names.get(key, key)] = key
    # A class may count its layers by a list and ignore the number (the review then says so).
    fallback = next((key for key in COMMON_KEYS["layers"] if key in found.base.config), "")
    axes.keys.setdefault("layers", fallback or COMMON_KEYS["layers"][0])
    order = {axis: place for place, axis in enumerate(COMMON_KEYS)}
    axes.keys = dict(sorted(axes.keys.items(), key=lambda item: order.get(item[0], len(order))))
    sizes = {axis: int(found.base.config[key]) for axis, key in axes.keys.items() if key in found.base.config}
    for axis, key in axes.keys.items():
        if key in opened:
            axes.defaults[axis] = opened[key][1]
        else:
            _absent(axes, axis, key, found.base.config, sizes)
            _null(axes, axis, key, found.base, sizes)
    return axes


def _null(axes: Axes, axis: str, key: str, base: Observation, sizes: Mapping[str, int]) -> None:
    """What the stock class computes from an explicit null."""
    if axis not in ("kv_heads", "head_dim", "ffn") or axis in axes.defaults:
        return
    try:
        seen = observe({**base.config, key: None})
    except CheckpointError:
        return
    others = {name: each for name, each in sizes.items() if name != axis}
    value = sizes[axis]
    for name, shape in base.shapes.items():
        for was, now in zip(shape, seen.shapes.get(name, ()), strict=False):
            if was != now and was % value == 0 and now % (was // value) == 0:
                text = as_formula(now // (was // value), others)
                if isinstance(text, str):
                    axes.defaults[axis] = text
                return


def _absent(axes: Axes, axis: str, key: str, config: Config, sizes: Mapping[str, int]) -> None:
    """What the stock class takes where the key is absent: a formula (it moves with others) or a field default."""
    if axis not in ("kv_heads", "head_dim"):  # configs always give the others
        return
    wider = dict(config)
    for other, factor in (("hidden", 4), ("heads", 2)):
        if other in axes.keys:
            wider[axes.keys[other]] = config[axes.keys[other]] * factor
    value = without_key(config, key)
    if type(value) is not int:
        return
    text = as_formula(value, {name: each for name, each in sizes.items() if name != axis})
    if value != without_key(wider, key) and isinstance(text, str):
        axes.defaults[axis] = text
    else:
        axes.constants[key] = value


def without_key(config: Config, key: str) -> Any:
    """What the config class fills in where the key is absent; None where it then refuses its own value."""
    try:
        return getattr(stock_config({name: each for name, each in config.items() if name != key}), key, None)
    except CheckpointError:
        return None


def explore(config: Config) -> tuple[Probe, dict[str, tuple[Any, str | int]]]:
    """The numeric probe of a config, null sizes opened."""
    values, opened = open_nulls(dict(config))
    return probe(values, same_layout(observe(values)), flips=False), opened
