"""Draft a family file from a config alone: what the stock class builds decides, and what it cannot decide is marked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minitron_cli.errors import CheckpointError, ShapeError
from minitron_cli.families.expression import axes as axes_of
from minitron_cli.families.expression import parse
from minitron_cli.families.schema import Family, Tensor
from minitron_cli.models.draft_axes import Axes, axis_names, explore, find_axes, pattern_of, patterns
from minitron_cli.models.draft_facts import class_defaults, divisibility, rotation, ties, with_eps_key
from minitron_cli.models.draft_fit import Term, fit
from minitron_cli.models.draft_layers import layer_rules, layer_tags
from minitron_cli.models.draft_probe import (
    Config,
    Observation,
    Probe,
    build,
    cross_check,
    observe,
    saved_tensors,
    stock_values,
    switches,
)
from minitron_cli.models.draft_roles import Roles, dimension, find_roles, find_taps

NO_DECODER = ("add_cross_attention",)
"""Switches that make more of a model than a decoder: the family is for configs without."""


@dataclass
class Draft:
    """A family that explains a config's tensors, and what its author must look at.

    checks: tensor pattern to remarks; notes: remarks on the whole file.
    """

    family: Family
    checks: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """One setting of the config's switches: its numeric probe, and the tensors it adds with their conditions."""

    probe: Probe
    opened: Mapping[str, tuple[Any, str | int]]
    conditions: Mapping[str, tuple[str, ...]]


def draft_family(given: Config) -> Draft:
    """Draft the family of a config.json.

    Raises:
        CheckpointError: transformers does not know the type or refuses the config.
    """
    values = stock_values(given)
    first, other_layouts = _worlds(values)
    base = first[0].probe.base.config
    axes = find_axes(first[0].probe, first[0].opened, given)
    roles = find_roles(base)
    draft = Draft(_skeleton(values, axes), notes=[])
    tensors: dict[str, Tensor] = {}
    for number, world in enumerate(first):
        own = find_roles(world.probe.base.config) if number else roles
        for pattern in world.conditions:
            tensors[pattern] = _tensor(draft, pattern, world, axes, own)
    tags = layer_tags(values, first[0].probe.base, draft.checks)
    for pattern, have in tags.items():
        tensors[pattern] = replace(tensors[pattern], tags=have)
    _remark_on_norms(draft, tensors)
    used = {name for each in tensors.values() for dim in each.dims for name in axes_of(parse(dim))}
    ordered = _in_saved_order(tensors, first)
    draft.family = replace(
        draft.family,
        axes=axes.declared(used),
        tensors=ordered,
        taps=find_taps(roles, ordered),
        when=(*(f"{key}=={axes.keys[axis]}" for key, axis in axes.equal.items()), *other_layouts),
        defaults=class_defaults(values, axes, ordered),
        layer_rules=layer_rules(values, draft.notes),
        divides=divisibility(base, axes),
        coupled={"hidden": "heads*head_dim"} if axes.derives_head_dim and "head_dim" in used else {},
        norm=with_eps_key(roles.norm, base),
        rotary=rotation(base, axes, draft.notes),
        tied=ties(values),
    )
    _review(draft, values, first[0].probe)
    return draft


def _skeleton(values: Config, axes: Axes) -> Family:
    name = re.sub(r"\W", "_", str(values["model_type"]))
    return Family(name, (str(values["model_type"]),), axes.declared(set()), {}, draft=True)


def _worlds(values: dict[str, Any]) -> tuple[list[World], tuple[str, ...]]:
    """The config as it is, each switch that adds tensors flipped, and conditions on those that change the layout."""
    base = observe(values)
    flipped: dict[str, Observation] = {}
    for key in switches(values):
        try:
            flipped[key] = observe({**values, key: not values[key]}, key)
        except CheckpointError:
            continue
    layouts = {key for key, seen in flipped.items() if key in NO_DECODER or _other_sizes(base, seen)}
    if "experts" not in _held_axes(values):
        # A second index that counts no experts (a norm per head): tensors that no table can name.
        layouts |= {key for key, seen in flipped.items() if any("{expert}" in each for each in patterns(seen.shapes))}
    layouts -= {key for key in NO_DECODER if key in flipped and flipped[key].shapes == base.shapes}
    plain = {key: seen for key, seen in flipped.items() if key not in layouts}
    known = patterns(base.shapes).keys()
    worlds = [_world(values, {pattern: _conditions(values, pattern, plain) for pattern in known})]
    for key, seen in plain.items():
        covered = {pattern for world in worlds for pattern in world.conditions}
        added = patterns(seen.shapes).keys() - covered
        if added:
            there = {**values, key: not values[key]}
            again = {other: _flip(there, other) for other in plain if other != key}
            own = {key: base, **{other: each for other, each in again.items() if each is not None}}
            worlds.append(_world(there, {pattern: _conditions(there, pattern, own) for pattern in sorted(added)}))
    return worlds, tuple(key if values[key] else f"!{key}" for key in sorted(layouts))


def _held_axes(values: Config) -> set[str]:
    names = axis_names(values)
    return {names[key] for key, value in values.items() if key in names and type(value) is int}


def _world(values: dict[str, Any], conditions: Mapping[str, tuple[str, ...]]) -> World:
    found, opened = explore(values)
    return World(found, opened, conditions)


def _flip(values: dict[str, Any], key: str) -> Observation | None:
    try:
        return observe({**values, key: not values[key]}, key)
    except CheckpointError:
        return None


def _other_sizes(base: Observation, seen: Observation) -> bool:
    return any(seen.shapes.get(name, shape) != shape for name, shape in base.shapes.items())


def _conditions(values: Config, pattern: str, flipped: Mapping[str, Observation]) -> tuple[str, ...]:
    """The switches without which the pattern is gone."""
    return tuple(
        key if values[key] else f"!{key}" for key, seen in flipped.items() if pattern not in patterns(seen.shapes)
    )


def _tensor(draft: Draft, pattern: str, world: World, axes: Axes, roles: Roles) -> Tensor:
    """One tensor's declaration; what is undecided goes into the draft's checks."""
    remarks: list[str] = []
    # A switch may have closed a null that the first world opened: such observations say nothing about that axis.
    needed = [key for axis, key in axes.keys.items() if axis != "layers"]
    usable = [seen for seen in world.probe.observations if all(seen.config.get(key) for key in needed)]
    entries = [patterns(seen.shapes).get(pattern, []) for seen in usable]
    shapes = [each[0][1] for each in entries if each]
    sizes = [axes.sizes(seen.config) for seen, each in zip(usable, entries, strict=True) if each]
    if any(shape != each[0][1] for each in entries for _, shape in each):
        remarks.append("its size differs between layers; this is the first layer's")
    dims = []
    for number in range(len(shapes[0])):
        found = fit([shape[number] for shape in shapes], sizes)
        if not found:
            remarks.append(f"no expression reproduces dimension {number}; {shapes[0][number]} is its size here")
            found = [(Term((), shapes[0][number]),)]
        dims.append(dimension(found, pattern, number, axes, roles, remarks))
    role, norm = roles.of(pattern, tuple(dims), remarks)
    if remarks:
        draft.checks[pattern] = remarks
    return Tensor(tuple(dims), (), world.conditions[pattern], role, norm)


def _remark_on_norms(draft: Draft, tensors: Mapping[str, Tensor]) -> None:
    """Where only some configs norm their queries, the softmax scale sits in the projection or in the norm."""
    switched = {each for tensor in tensors.values() if tensor.role == "query_norm" for each in tensor.conditions}
    for pattern in tensors if switched else ():
        if pattern.rpartition(".")[0].rpartition(".")[2].startswith("q") and tensors[pattern].role != "query_norm":
            names = ", ".join(sorted(switched))
            draft.checks.setdefault(pattern, []).append(
                f"with {names} a norm carries the softmax scale, without it this tensor: use conditions and otherwise"
            )


def _in_saved_order(tensors: Mapping[str, Tensor], worlds: list[World]) -> dict[str, Tensor]:
    """Patterns in the order of the model's modules; those of flipped switches after their neighbour of that model."""
    order: list[str] = []
    for world in worlds:
        before = -1
        for name in saved_tensors(build(world.probe.base.config)):
            pattern = pattern_of(name)[0]
            if pattern not in order:
                order.insert(before + 1, pattern)
            before = order.index(pattern)
    return {pattern: tensors[pattern] for pattern in order if pattern in tensors}


def _review(draft: Draft, values: Config, first: Probe) -> None:
    """Hold the draft against the stock class; what still differs, and what was not tried, becomes a remark."""
    try:
        result = cross_check(draft.family, values)
    except (CheckpointError, ShapeError, KeyError) as error:
        draft.notes.append(f"not compared with the stock class: {error}")
        return
    for line in result.disagreements[:5]:
        draft.notes.append(f"disagrees: {line}")
    sizes = [key for key in first.skipped if key in axis_names(values)]
    for key in sizes:
        draft.notes.append(f"{key} could not be changed alone ({first.skipped[key]})")
