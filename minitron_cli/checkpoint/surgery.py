"""Cut tensors by named axes. Knows expressions and axes; never a family, never a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.families.expression import Axis, Expression, Fixed, Product, Sum, axes, size
from minitron_cli.families.schema import Family, LayerRule, lookup

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Kept = Mapping[str, Indices]
"""Axis to the kept units: (kept,), or (units of the outer axis, kept) for an axis chosen `within` another.

Rows of a two-dimensional choice are indexed by the ORIGINAL unit of the outer axis, so that cutting both axes at once
needs no renumbering.
"""


def positions(
    expression: Expression,
    sizes: Mapping[str, int],
    kept: Kept,
    within: Mapping[str, str],
    outer: Mapping[str, int] | None = None,
) -> Indices:
    """Kept positions of a dimension, in the order they will be written: (kept positions,).

    `sizes` are the original sizes; `within` maps an axis to the axis its choice depends on; `outer` maps axes to the
    unit that the whole tensor belongs to (the expert).
    """
    return _positions(expression, sizes, kept, within, outer or {})


def _positions(
    expression: Expression, sizes: Mapping[str, int], kept: Kept, within: Mapping[str, str], outer: Mapping[str, int]
) -> Indices:
    match expression:
        case Axis(name):
            chosen = kept.get(name)
            if chosen is None:
                return np.arange(sizes[name])
            return chosen[outer[within[name]]] if chosen.ndim == 2 else chosen
        case Fixed(count):
            return np.arange(count)
        case Sum(terms):
            parts, offset = [], 0
            for term in terms:
                parts.append(_positions(term, sizes, kept, within, outer) + offset)
                offset += size(term, sizes)
            return np.concatenate(parts)
        case Product(factors):
            head, tail = factors[0], factors[1:]
            if not tail:
                return _positions(head, sizes, kept, within, outer)
            rest: Expression = tail[0] if len(tail) == 1 else Product(tail)
            stride = size(rest, sizes)
            units = _positions(head, sizes, kept, within, outer)
            name = head.name if isinstance(head, Axis) else ""
            if not any(within.get(axis) == name and _is_nested(kept, axis) for axis in axes(rest)):
                return (units[:, None] * stride + _positions(rest, sizes, kept, within, outer)).reshape(-1)
            return np.concatenate(
                [unit * stride + _positions(rest, sizes, kept, within, {**outer, name: int(unit)}) for unit in units]
            )


def _is_nested(kept: Kept, axis: str) -> bool:
    return axis in kept and kept[axis].ndim == 2


def labels(expression: Expression, sizes: Mapping[str, int], axis: str, outer: str = "") -> Indices:
    """For every position of a dimension, which unit of `axis` it belongs to (-1: none): (positions,).

    With `outer`, units are numbered across the outer axis: outer unit * size(axis) + unit.
    """
    match expression:
        case Axis(name):
            return np.arange(sizes[name]) if name == axis else np.full(sizes[name], -1)
        case Fixed(count):
            return np.full(count, -1)
        case Sum(terms):
            return np.concatenate([labels(term, sizes, axis, outer) for term in terms])
        case Product(factors):
            head, tail = factors[0], factors[1:]
            if not tail:
                return labels(head, sizes, axis, outer)
            rest: Expression = tail[0] if len(tail) == 1 else Product(tail)
            inner = labels(rest, sizes, axis, outer)
            units = np.arange(size(head, sizes))
            if isinstance(head, Axis) and head.name == axis:
                return np.repeat(units, len(inner))
            if outer and isinstance(head, Axis) and head.name == outer:
                return np.where(inner < 0, -1, units[:, None] * sizes[axis] + inner).reshape(-1)
            own = labels(head, sizes, axis, outer)
            return np.where(inner[None, :] >= 0, inner[None, :], own[:, None]).reshape(-1)


def cut(array: Array, selections: Sequence[Indices], room: Callable[[tuple[int, ...]], Array]) -> Array:
    """Select kept positions, ascending and each once, along every dimension; a complete selection copies nothing.

    `room(shape)` gives memory to cut into; it is asked once per dimension that is cut.
    """
    for dim, chosen in enumerate(selections):
        if len(chosen) < array.shape[dim]:
            shape = (*array.shape[:dim], len(chosen), *array.shape[dim + 1 :])
            # Positions are in range; only this mode writes straight into `out`.
            array = np.take(array, chosen, axis=dim, out=room(shape), mode="clip")
    return array


def softmax_fold(head_dim: int, new_head_dim: int) -> float:
    """Factor on queries that keeps the softmax scale 1/sqrt(d) when the stock class will apply 1/sqrt(d')."""
    return math.sqrt(new_head_dim / head_dim)


def of_term(expression: Expression, sizes: Mapping[str, int], number: int = 0) -> npt.NDArray[np.bool_]:
    """Positions that belong to one term of every sum, as queries of a fused projection to its first: (positions,)."""
    match expression:
        case Axis() | Fixed():
            return np.ones(size(expression, sizes), bool)
        case Sum(terms):
            return np.concatenate(
                [
                    of_term(term, sizes, number) if place == number else np.zeros(size(term, sizes), bool)
                    for place, term in enumerate(terms)
                ]
            )
        case Product(factors):
            mask = np.ones(1, bool)
            for factor in factors:
                mask = (mask[:, None] & of_term(factor, sizes, number)).reshape(-1)
            return mask


def new_config(
    config: Mapping[str, Any],
    family: Family,
    sizes: Mapping[str, int],
    kept_layers: list[int],
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of the cut model; keys we do not know stay as they are.

    Args:
        sizes: the new sizes of all axes.
        kept_layers: original numbers of the layers that stay, ascending.
        changes: further top-level keys to set, or to remove where None.
    """
    result: dict[str, Any] = dict(config)
    old = family.sizes(config)
    for axis in family.axes:
        # An axis the stock class derives from others must be written out once those change.
        derived = isinstance(axis.default, str) and lookup(config, axis.key) is None
        if axis.key and (sizes[axis.name] != old[axis.name] or derived):
            for key in [other for other, key in family.spellings.items() if key == axis.key and other in config]:
                _set(result, key, sizes[axis.name])
            if axis.key in config or axis.key not in family.spellings.values():
                _set(result, axis.key, sizes[axis.name])
    chosen = family.chosen_experts(config, sizes)
    if chosen != family.chosen_experts(config, old):
        _set(result, str(family.chosen_key), chosen)
    if len(kept_layers) != old["layers"]:
        for rule in family.layer_rules:
            _cut_rule(result, rule, family.with_defaults(config), kept_layers)
    for key, value in (changes or {}).items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def _cut_rule(config: dict[str, Any], rule: LayerRule, full: Mapping[str, Any], kept_layers: list[int]) -> None:
    """Per-layer entries follow the layers (stock classes refuse or misread lists of another length)."""
    value = config.get(rule.key)
    periods = [each.key for each in rule.walk() if each.kind == "period" and full.get(each.key) not in (None, 1)]
    if rule.kind == "indices" and periods:
        # Every layer is of the period from now on, and those that were not are named one by one.
        inside = rule.tags["in"]
        config[rule.key] = [new for new, layer in enumerate(kept_layers) if rule.tag(full, layer) == inside]
        config.update(dict.fromkeys(periods, 1))
        return
    if value is None:
        if isinstance(rule.absent, str):
            return
        if rule.kind != "list" or (rule.absent.key in config and rule.absent.kind == "pattern"):
            _cut_rule(config, rule.absent, full, kept_layers)
            return
        # What the class computes from layer numbers is no longer true of the kept layers: write it out.
        word_of = {tag: word for word, tag in rule.tags.items()}
        tags = [rule.tag(full, layer) for layer in kept_layers]
        config[rule.key] = [word_of.get(tag, tag) for tag in tags]
        return
    match rule.kind:
        case "list":
            config[rule.key] = [value[layer] for layer in kept_layers]
            if isinstance(rule.absent, LayerRule) and rule.absent.kind == "pattern":
                _cut_rule(config, rule.absent, full, kept_layers)  # not read by the stock class, and by others
            return
        case "pattern":
            config[rule.key] = "".join(value[layer] for layer in kept_layers)
        case "indices":
            config[rule.key] = [new for new, layer in enumerate(kept_layers) if layer in value]
        case "leading":
            config[rule.key] = sum(layer < value for layer in kept_layers)
        case "period" if value != 1:
            raise AssertionError(f"period rule {rule.key} must be made explicit before layers are cut")
    for answer in rule.tags.values():
        if isinstance(answer, LayerRule):
            _cut_rule(config, answer, full, kept_layers)


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config[part] = dict(config[part])  # never write into the caller's nested section
        config = config[part]
    config[last] = value
