"""Cut tensors by named axes. Knows expressions and axes; never a family, never a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitron_cli.families.expression import Axis, Expression, Fixed, Product, Sum, axes, size
from minitron_cli.families.schema import Family, lookup

Indices = npt.NDArray[np.int64]
Kept = Mapping[str, Indices]
"""Axis to the kept units: (kept,), or (units of the outer axis, kept) for an axis chosen `within` another.

Rows of a two-dimensional choice are indexed by the ORIGINAL unit of the outer axis, so that cutting both axes at once
needs no renumbering.
"""


def positions(expression: Expression, sizes: Mapping[str, int], kept: Kept, within: Mapping[str, str]) -> Indices:
    """Kept positions of a dimension, in the order they will be written: (kept positions,).

    `sizes` are the original sizes; `within` maps an axis to the axis its choice depends on.
    """
    return _positions(expression, sizes, kept, within, {})


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


def cut(tensor: torch.Tensor, selections: list[Indices]) -> torch.Tensor:
    """Select kept positions along every dimension; a complete ascending selection copies nothing."""
    for dim, chosen in enumerate(selections):
        if len(chosen) == tensor.shape[dim] and bool(np.all(chosen == np.arange(len(chosen)))):
            continue
        tensor = tensor.index_select(dim, torch.from_numpy(np.ascontiguousarray(chosen)))
    return tensor


def rotary_pairs(head_dim: int, layout: str, pairs: Indices) -> Indices:
    """Channels of the kept rotary pairs, in the order the stock layout expects: (2 * pairs,)."""
    if layout == "half":
        return np.concatenate([pairs, pairs + head_dim // 2])
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


def rotary_theta(theta: float, head_dim: int, new_head_dim: int, step: int) -> float:
    """theta' such that the new frequencies are those of pairs 0, step, 2*step, ...: theta^(step*d'/d)."""
    return float(theta ** (step * new_head_dim / head_dim))


def softmax_fold(head_dim: int, new_head_dim: int) -> float:
    """Factor on queries that keeps the softmax scale 1/sqrt(d) when the stock class will apply 1/sqrt(d')."""
    return math.sqrt(new_head_dim / head_dim)


def new_config(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int], kept_layers: list[int], theta: float | None
) -> dict[str, Any]:
    """config.json of the cut model; keys we do not know stay as they are.

    Args:
        sizes: the new sizes of all axes.
        kept_layers: original numbers of the layers that stay, ascending.
        theta: new rotary base, or None to leave it.
    """
    result: dict[str, Any] = dict(config)
    old = family.sizes(config)
    for axis in family.axes:
        # An axis the stock class derives from others must be written out once those change.
        derived = isinstance(axis.default, str) and lookup(config, axis.key) is None
        if axis.key and (sizes[axis.name] != old[axis.name] or derived):
            _set(result, axis.key, sizes[axis.name])
    if len(kept_layers) != old["layers"]:
        _cut_layer_keys(result, family, kept_layers)
    if theta is not None:
        key = "rope_parameters.rope_theta" if isinstance(config.get("rope_parameters"), Mapping) else "rope_theta"
        _set(result, key, theta)
    return result


def _cut_layer_keys(config: dict[str, Any], family: Family, kept_layers: list[int]) -> None:
    """Per-layer entries follow the layers (stock classes refuse or misread lists of another length)."""
    for rule in (step for rule in family.layer_rules for step in rule.walk()):
        value = config.get(rule.key)
        if value is None:
            continue
        match rule.kind:
            case "list":
                config[rule.key] = [value[layer] for layer in kept_layers]
            case "pattern":
                config[rule.key] = "".join(value[layer] for layer in kept_layers)
            case "indices":
                config[rule.key] = [new for new, layer in enumerate(kept_layers) if layer in value]
            case "leading":
                config[rule.key] = sum(layer < value for layer in kept_layers)
            case "period":
                raise AssertionError(f"period rule {rule.key} must be made explicit before layers are cut")


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config[part] = dict(config[part])  # never write into the caller's nested section
        config = config[part]
    config[last] = value
