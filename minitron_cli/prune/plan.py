"""From scores and target sizes to a plan: what stays, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minitron_cli.checkpoint.rotary import choose, retuned
from minitron_cli.checkpoint.surgery import Indices, Kept, new_config
from minitron_cli.config.prune import Rescale
from minitron_cli.errors import InputError, ShapeError
from minitron_cli.importance.layout import CELLS, Scores
from minitron_cli.prune.nested import choose_nested
from minitron_cli.prune.residual import require_readers, rescaling, tied_head, untying
from minitron_cli.prune.sizes import complete_target
from minitron_cli.shape import Shape

UNSPOKEN = ("group", "mamba_group", "linear_group", "vocab")
"""Axes that follow from others, or never change: not told to people."""


@dataclass(frozen=True)
class PrunePlan:
    """What stays. Plain data: printed by --dry-run, saved beside the result, accepted by --plan.

    `keep` maps an axis to kept unit numbers, ascending: a list for an axis chosen once for the model; for an axis
    chosen per layer one list per kept layer (of lists, one per outer unit, for an axis chosen within another), empty
    for layers that have none.
    `rescale` maps a tensor (its name before the cut) to the factor on what it applies. With `rotate`, hidden units are
    the directions of the residual stream by falling energy, whose basis the importance directory `statistics` holds;
    with `untie` a head that is the embedding table becomes a matrix of its own by that.
    `repair` says on which data and sequences projections are fitted again, None that they are not.
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
    rescale: dict[str, float] = field(default_factory=dict)
    rotate: bool = False
    statistics: str = ""
    untie: bool = False
    repair: dict[str, Any] | None = None

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

    @cached_property
    def kept(self) -> Callable[[int | None], Kept]:
        """Kept units of every cut axis, as seen by one layer (original number) or outside the layers."""
        return lru_cache(4)(self._kept)

    def _kept(self, layer: int | None) -> Kept:
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
    shape: Shape,
    scores: Scores,
    target: Mapping[str, int],
    *,
    ranked_by: str,
    drop_layers: tuple[int, ...] = (),
    rescale: Rescale = "auto",
    rotate: Path | None = None,
    untie: bool = False,
) -> PrunePlan:
    """Choose what stays: the units of highest score, in their original order.

    Args:
        scores: of units, and the energies of the residual stream that `rescale` and `rotate` need.
        rotate: the importance directory that holds the directions of the stream, to turn to them where that is exact
            or hidden units leave.
        untie: give a head that is the embedding table a matrix of its own where the stream is rotated.

    Raises:
        ShapeError: from the target, or drop_layers names a layer that does not exist.
        InputError: norms cannot be rescaled as asked for.
    """
    family, old = shape.family, shape.sizes
    layers = _kept_layers(shape, scores, target, drop_layers)
    sizes = complete_target(shape, {**target, "layers": len(layers)})
    keep: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    if CELLS in scores:
        having = shape.layers_with(family.nested[0])
        nested = choose_nested(family, scores[CELLS], sizes, layers, having, _choose)
    step = 1
    rotary = family.rotary
    for axis in family.cut_axes:
        name = axis.name
        if sizes[name] == old[name]:
            continue
        if rotary is not None and name == rotary.axis:
            # One choice for the model: theta is one number.
            step, keep[name] = choose(rotary, shape.config, scores[name].sum(0), old[name], sizes[name])
        elif name in nested:
            keep[name] = nested[name]
        elif name == "hidden" and rotate is not None:
            keep[name] = list(range(sizes[name]))
        elif axis.per_layer:
            having = shape.layers_with(name)
            blocks = sizes[axis.evenly] if axis.evenly else 1
            keep[name] = [
                _choose(name, scores[name][layer], sizes[name], blocks) if layer in having else [] for layer in layers
            ]
        else:
            keep[name] = _choose(name, scores[name], sizes[name])
    plan = PrunePlan(family.name, dict(old), sizes, layers, keep, step, ranked_by, shape.params, 0)
    untie = untie and tied_head(shape) is not None
    if rotate is not None and ("hidden" in keep or untie or tied_head(shape) is None):
        plan = replace(plan, rotate=True, statistics=str(rotate.absolute()), untie=untie)
    factors = rescaling(shape, scores, layers, keep.get("hidden"), rescale, rotated=plan.rotate, untied=plan.untie)
    return _counted(shape, replace(plan, rescale=factors))


def size_plan(
    shape: Shape,
    target: Mapping[str, int],
    *,
    drop_layers: tuple[int, ...] = (),
    rotate: bool = False,
    untie: bool = False,
) -> PrunePlan:
    """Sizes and parameters of a cut, from config.json alone: no units are chosen, and the first layers stand for all.

    Raises:
        ShapeError: from the target.
    """
    first = {"layers": -np.arange(shape.sizes["layers"], dtype=np.float64)}
    layers = _kept_layers(shape, first, target, drop_layers)
    sizes = complete_target(shape, {**target, "layers": len(layers)})
    ranked_by = "nothing: there are no weights here, only sizes"
    if rotate:
        require_readers(shape)
    plan = PrunePlan(
        shape.family.name, dict(shape.sizes), sizes, layers, {}, 1, ranked_by, shape.params, 0, rotate=rotate,
        untie=rotate and untie and tied_head(shape) is not None,
    )  # fmt: skip
    return _counted(shape, plan)


def _counted(shape: Shape, plan: PrunePlan) -> PrunePlan:
    return replace(plan, params_after=Shape.of(planned_config(shape, plan)).params)


def _kept_layers(shape: Shape, scores: Scores, target: Mapping[str, int], drop: tuple[int, ...]) -> list[int]:
    count = shape.sizes["layers"]
    for layer in drop:
        if layer >= count:
            raise ShapeError(f"--drop-layers {layer}: the model has layers 0 to {count - 1}.")
    wanted = target.get("layers", count)
    if wanted > count:
        raise ShapeError(f"--layers {wanted} is larger than the original {count}; pruning only removes.")
    if drop:
        kept = [layer for layer in range(count) if layer not in drop]
    elif wanted == count:
        return list(range(count))
    else:
        kept = best_layers(shape, scores["layers"], wanted)
    if not kept:
        raise ShapeError("--drop-layers would remove every layer.")
    for tag, source in shape.family.required.items():
        having = _tagged(shape, tag)
        if having and not having & {*kept}:
            raise ShapeError(
                f"--drop-layers would leave no {tag.replace('_', ' ')} layer (those are {_listed(having)}), and the "
                f"stock class needs one ({source})."
            )
    return kept


def best_layers(shape: Shape, scores: Any, wanted: int) -> list[int]:
    """The best layers by (layers,) scores, in order; one of each kind that the stock class needs is among them."""
    values = np.asarray(scores, np.float64)
    for tag in shape.family.required:
        having = sorted(_tagged(shape, tag))
        if having and wanted > 0:
            values = values.copy()
            values[max(having, key=lambda layer: float(values[layer]))] = values.max() + 1
    return _choose("layers", values, wanted)


def _tagged(shape: Shape, tag: str) -> set[int]:
    tags = shape.family.layer_tags(shape.config, shape["layers"])
    return {layer for layer, words in enumerate(tags) if tag in words}


def _listed(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _choose(name: str, scores: Any, count: int, blocks: int = 1) -> list[Any]:
    """The best units of an axis, equally many of each block, as a plan lists them.

    Raises:
        InputError: the scores are not numbers, or all the same.
    """
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"Scores of {name} are not finite; score the checkpoint again, with --dtype float32.")
    if values.size > 1 and values.min() == values.max():
        raise InputError(f"All scores of {name} are the same, so they rank nothing; score again, on other data.")
    if blocks == 1:
        chosen: list[Any] = top_units(values, count).tolist()
        return chosen
    starts = np.arange(blocks)[:, None] * (len(values) // blocks)
    evenly: list[Any] = (top_units(values.reshape(blocks, -1), count // blocks) + starts).reshape(-1).tolist()
    return evenly


def top_units(scores: Indices | Any, count: int) -> Indices:
    """Numbers of the `count` highest scores along the last dimension, ascending; ties go to the lower number."""
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1)


def planned_config(shape: Shape, plan: PrunePlan) -> dict[str, Any]:
    """config.json of the planned model."""
    rotary, changes = shape.family.rotary, {}
    if rotary is not None and plan.sizes[rotary.axis] != shape.sizes[rotary.axis]:
        old, new = shape.sizes[rotary.axis], plan.sizes[rotary.axis]
        changes = retuned(shape.config, rotary, old, new, plan.rotary_step)
    if plan.untie:
        changes |= untying(shape)
    # What the stock class does not load is not written, and the config must not promise it.
    changes |= {key: value for key, value in shape.family.dropped_config.items() if shape.config.get(key)}
    return new_config(shape.config, shape.family, plan.sizes, plan.layers, changes)


def describe(plan: PrunePlan) -> str:
    """The plan for a person: each axis before and after, layers dropped, parameters."""
    lines = []
    shown = [name for name, size in plan.sizes_before.items() if size and name not in UNSPOKEN]
    if "head_dim" in shown:  # which that of values is
        shown = [name for name in shown if name != "v_head_dim"]
    width = 2 + max(map(len, (*shown, "ranked by")))
    for name in shown:
        before, after = plan.sizes_before[name], plan.sizes[name]
        change = f"{before} -> {after}" if before != after else f"{before}"
        note = ""
        if name == "layers" and before != after:
            gone = [layer for layer in range(before) if layer not in plan.layers]
            note = f"  (removed: {', '.join(map(str, gone))})"
        lines.append(f"  {name:<{width}}{change}{note}")
    share = 100 * plan.params_after / plan.params_before
    lines.append(f"  {'params':<{width}}{plan.params_before:,} -> {plan.params_after:,}  ({share:.1f} %)")
    lines.append(f"  {'ranked by':<{width}}{plan.ranked_by}")
    if plan.rotate:
        untied = plan.sizes["vocab"] * plan.sizes["hidden"]
        head = f"; the tied head becomes a matrix of its own, {untied:,} parameters" if plan.untie else ""
        lines.append(f"  {'rotated':<{width}}hidden units are directions of the residual stream{head}")
    if plan.repair is not None:
        lines.append(f"  {'repaired':<{width}}on {plan.repair['samples']} sequences of {plan.repair['data']}")
    if plan.rescale:
        factors = plan.rescale.values()
        lines.append(f"  {'rescaled':<{width}}{len(factors)} tensors, by {min(factors):.3f} to {max(factors):.3f}")
    return "\n".join(lines)
