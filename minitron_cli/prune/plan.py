"""From scores and target sizes to a plan: what stays, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minitron_cli.checkpoint.rotary import choose, retuned
from minitron_cli.checkpoint.surgery import Indices, Kept, new_config
from minitron_cli.errors import InputError, ShapeError
from minitron_cli.importance.layout import Scores
from minitron_cli.prune.sizes import complete_target
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class PrunePlan:
    """What stays. Plain data: printed by --dry-run, saved beside the result, accepted by --plan.

    `keep` maps an axis to kept unit numbers, ascending: a list for an axis chosen once for the model; for an axis
    chosen per layer one list per kept layer (of lists, one per outer unit, for an axis chosen within another).
    """

    family: str
    sizes_before: dict[str, int]
    sizes: dict[str, int]
    layers: list[int]
    keep: dict[str, Any]
    rotary_step: int
    ranked_by: str
    params_before: int
    params_after: int

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PrunePlan:
        """Read a saved plan.

        Raises:
            InputError: a key is missing or unknown.
        """
        try:
            return cls(**value)
        except TypeError as error:
            raise InputError(
                f"This is not a prune plan ({error}); make one with `minitron prune --dry-run --json`."
            ) from None

    def kept(self, layer: int | None) -> Kept:
        """Kept units of every cut axis, as seen by one layer (original number) or outside the layers."""
        result: dict[str, Indices] = {}
        for axis, units in self.keep.items():
            array = (
                np.asarray(_at(units, self.layers, layer), np.int64) if _nested(units) else np.asarray(units, np.int64)
            )
            if not _nested(units) or layer is not None:
                result[axis] = array
        return result


def _nested(units: Any) -> bool:
    return bool(units) and isinstance(units[0], list)


def _at(units: list[Any], layers: list[int], layer: int | None) -> Any:
    return units[layers.index(layer)] if layer is not None else []


def make_plan(
    shape: Shape, scores: Scores, target: Mapping[str, int], *, ranked_by: str, drop_layers: tuple[int, ...] = ()
) -> PrunePlan:
    """Choose what stays: the units of highest score, in their original order.

    Raises:
        ShapeError: from the target, or drop_layers names a layer that does not exist.
    """
    family, old = shape.family, shape.sizes
    layers = _kept_layers(shape, scores, target, drop_layers)
    sizes = complete_target(shape, {**target, "layers": len(layers)})
    keep: dict[str, Any] = {}
    step = 1
    rotary = family.rotary
    for axis in family.cut_axes:
        name = axis.name
        if sizes[name] == old[name]:
            continue
        if rotary is not None and name == rotary.axis:
            # One choice for the model: theta is one number.
            step, keep[name] = choose(rotary, shape.config, scores[name].sum(0), old[name], sizes[name])
        elif axis.per_layer:
            keep[name] = [top_units(scores[name][layer], sizes[name]).tolist() for layer in layers]
        else:
            keep[name] = top_units(scores[name], sizes[name]).tolist()
    return _counted(shape, PrunePlan(family.name, dict(old), sizes, layers, keep, step, ranked_by, shape.params, 0))


def size_plan(shape: Shape, target: Mapping[str, int], *, drop_layers: tuple[int, ...] = ()) -> PrunePlan:
    """Sizes and parameters of a cut, from config.json alone: no units are chosen, and the first layers stand for all.

    Raises:
        ShapeError: from the target.
    """
    first = {"layers": -np.arange(shape.sizes["layers"], dtype=np.float64)}
    layers = _kept_layers(shape, first, target, drop_layers)
    sizes = complete_target(shape, {**target, "layers": len(layers)})
    ranked_by = "nothing: there are no weights here, only sizes"
    plan = PrunePlan(shape.family.name, dict(shape.sizes), sizes, layers, {}, 1, ranked_by, shape.params, 0)
    return _counted(shape, plan)


def _counted(shape: Shape, plan: PrunePlan) -> PrunePlan:
    return replace(plan, params_after=Shape.of(planned_config(shape, plan)).params)


def _kept_layers(shape: Shape, scores: Scores, target: Mapping[str, int], drop: tuple[int, ...]) -> list[int]:
    count = shape.sizes["layers"]
    for layer in drop:
        if layer >= count:
            raise ShapeError(f"--drop-layers {layer}: the model has layers 0 to {count - 1}.")
    if drop:
        kept = [layer for layer in range(count) if layer not in drop]
        if not kept:
            raise ShapeError("--drop-layers would remove every layer.")
        return kept
    wanted = target.get("layers", count)
    if wanted >= count:
        if wanted > count:
            raise ShapeError(f"--layers {wanted} is larger than the original {count}; pruning only removes.")
        return list(range(count))
    return [int(layer) for layer in top_units(scores["layers"], wanted)]


def top_units(scores: Indices | Any, count: int) -> Indices:
    """Numbers of the `count` highest scores along the last dimension, ascending; ties go to the lower number."""
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1)


def planned_config(shape: Shape, plan: PrunePlan) -> dict[str, Any]:
    """config.json of the planned model."""
    rotary, changes = shape.family.rotary, None
    if rotary is not None and plan.sizes[rotary.axis] != shape.sizes[rotary.axis]:
        old, new = shape.sizes[rotary.axis], plan.sizes[rotary.axis]
        changes = retuned(shape.config, rotary, old, new, plan.rotary_step)
    return new_config(shape.config, shape.family, plan.sizes, plan.layers, changes)


def describe(plan: PrunePlan) -> str:
    """The plan for a person: each axis before and after, layers dropped, parameters."""
    lines = []
    shown = [name for name in plan.sizes_before if name not in ("group", "v_head_dim", "vocab")]
    for name in shown:
        before, after = plan.sizes_before[name], plan.sizes[name]
        change = f"{before} -> {after}" if before != after else f"{before}"
        note = ""
        if name == "layers" and before != after:
            gone = [layer for layer in range(before) if layer not in plan.layers]
            note = f"  (removed: {', '.join(map(str, gone))})"
        lines.append(f"  {name:<10}{change}{note}")
    share = 100 * plan.params_after / plan.params_before
    lines.append(f"  {'params':<10}{plan.params_before:,} -> {plan.params_after:,}  ({share:.1f} %)")
    lines.append(f"  {'ranked by':<10}{plan.ranked_by}")
    return "\n".join(lines)
