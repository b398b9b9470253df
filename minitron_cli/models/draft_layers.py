"""How layers differ: lists in the config, and tensors that only some layers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import LayerRule
from minitron_cli.models.draft_axes import patterns
from minitron_cli.models.draft_probe import Config, Observation, stock_values


def layer_lists(values: Config) -> dict[str, list[Any]]:
    """The config's lists with one word or number per layer."""
    lengths = [value for key, value in values.items() if type(value) is int and "layer" in key]
    return {
        key: list(value)
        for key, value in values.items()
        if isinstance(value, list | tuple) and len(value) in lengths and all(isinstance(v, str | int) for v in value)
    }


def layer_rules(values: Config, notes: list[str]) -> tuple[LayerRule, ...]:
    """One rule per list of words; what the stock class does without the list is computed by leaving it out."""
    rules = []
    for key, words in layer_lists(values).items():
        if not all(isinstance(word, str) for word in words):
            notes.append(f"{key} holds {words}: a list per layer that needs a LayerRule if layers are cut")
            continue
        rules.append(LayerRule(key, "list", absent=_absent(values, key, notes)))
    return tuple(rules)


def _absent(values: Config, key: str, notes: list[str]) -> str | LayerRule:
    try:
        words = stock_values({name: each for name, each in values.items() if name != key}).get(key)
    except CheckpointError:
        words = None
    if not isinstance(words, list | tuple) or not words:
        notes.append(f"{key}: read in the stock class what layers are where it is absent")
        return ""
    if len(set(words)) == 1:
        notes.append(f"{key}: every layer is {words[0]} where it is absent and all else is as here")
        return str(words[0])
    for period in range(2, len(words)):
        inside = {word for place, word in enumerate(words, 1) if place % period == 0}
        outside = {word for place, word in enumerate(words, 1) if place % period}
        if len(inside) == len(outside) == 1:
            notes.append(f"{key}: where it is absent every {period}th layer is {min(inside)}; a key may set the period")
            return LayerRule("", "period", {"in": min(inside), "out": min(outside)}, fixed=period)
    notes.append(f"{key}: the stock class makes {list(words)} where it is absent; find its rule")
    return ""


def layer_tags(values: Config, base: Observation, checks: dict[str, list[str]]) -> Mapping[str, tuple[str, ...]]:
    """The words that a layer must have for tensors that only some layers hold."""
    found: dict[str, tuple[str, ...]] = {}
    everywhere = {indices[0] for each in patterns(base.shapes).values() for indices, _ in each if indices}
    lists = {key: words for key, words in layer_lists(values).items() if len(words) == len(everywhere)}
    for pattern, entries in patterns(base.shapes).items():
        layers = {indices[0] for indices, _ in entries if indices}
        if "{layer}" not in pattern or layers == everywhere:
            continue
        words = [
            str(word)
            for each in lists.values()
            for word in dict.fromkeys(each)
            if {place for place, own in enumerate(each) if own == word} == layers
        ]
        if words:
            found[pattern] = (words[0],)
        else:
            shown = ", ".join(map(str, sorted(layers)[:8]))
            checks.setdefault(pattern, []).append(f"only in layers {shown}: write a LayerRule that says so")
    return found
