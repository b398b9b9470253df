"""From scores and target sizes to a plan: what stays, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_cli.checkpoint.surgery import Indices, Kept, new_config, rotary_pairs, rotary_theta
from minitron_cli.errors import InputError, ShapeError
from minitron_cli.families.expression import parse, size
from minitron_cli.families.schema import Family, lookup
from minitron_cli.importance.layout import Scores
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
            raise InputError(f"This is not a prune plan ({error}); make one with `minitron prune --dry-run --json`.") from None

    def kept(self, layer: int | None) -> Kept:
        """Kept units of every cut axis, as seen by one layer (original number) or outside the layers."""
        result: dict[str, Indices] = {}
        for axis, units in self.keep.items():
            array = np.asarray(_at(units, self.layers, layer), np.int64) if _nested(units) else np.asarray(units, np.int64)
            if not _nested(units) or layer is not None:
                result[axis] = array
        return result


def _nested(units: Any) -> bool:
    return bool(units) and isinstance(units[0], list)


def _at(units: list[Any], layers: list[int], layer: int | None) -> Any:
    return units[layers.index(layer)] if layer is not None else []


def complete_target(shape: Shape, target: Mapping[str, int]) -> dict[str, int]:
    """New sizes of every axis, derived ones included, checked against the family's rules.

    A smaller `kv_heads` alone takes its query heads along.

    Raises:
        ShapeError: a size grows, may not be cut, or breaks a divisibility rule of the stock class.
    """
    family, old = shape.family, dict(shape.sizes)
    if family.draft:
        raise ShapeError(f"{family.name} can be inspected but not pruned yet; its cuts are not proven.")
    for name, value in target.items():
        axis = family.axis(name)
        if not axis.prunable and value != old[name]:
            raise ShapeError(f"--{name.replace('_', '-')}: {family.name} cannot cut it ({axis.why_not or 'derived'}).")
        if value > old[name]:
            raise ShapeError(f"--{name.replace('_', '-')} {value} is larger than the original {old[name]}; pruning only removes.")
        if value < 1:
            raise ShapeError(f"--{name.replace('_', '-')} must be at least 1.")
    sizes = {**old, **target}
    if "kv_heads" in target and "heads" not in target:
        sizes["heads"] = target["kv_heads"] * (old["heads"] // old["kv_heads"])
    for axis in family.axes:
        if not axis.key and isinstance(axis.default, str):
            sizes[axis.name] = family_derived(axis.default, sizes)
    check_rules(family, sizes)
    if sizes.get("group", 0) > old.get("group", 0):
        raise ShapeError(
            f"{sizes['heads']} query heads on {sizes['kv_heads']} KV heads are {sizes['group']} per group and the original "
            f"has {old['group']}; give --heads {sizes['kv_heads'] * old['group']} or fewer."
        )
    return sizes


def family_derived(text: str, sizes: Mapping[str, int]) -> int:
    """Size of a derived axis."""
    from minitron_cli.families.schema import formula

    return formula(text, sizes)


def check_rules(family: Family, sizes: Mapping[str, int]) -> None:
    """Divisibility rules of the stock class, rotary evenness, and coupled axes.

    Raises:
        ShapeError: with the rule's source.
    """
    for rule in family.divides:
        divisor = size(parse(rule.divisor), sizes)
        if divisor and sizes[rule.axis] % divisor:
            raise ShapeError(
                f"{rule.axis} {sizes[rule.axis]} is not a multiple of {rule.divisor} {divisor}, and the stock class "
                f"refuses that ({rule.source})."
            )
    for axis, expression in family.coupled.items():
        if sizes[axis] != size(parse(expression), sizes):
            raise ShapeError(f"{family.name} computes {axis} = {expression}; cut both so that they agree.")
    if family.rotary is not None and sizes[family.rotary.axis] % 2:
        raise ShapeError(f"{family.rotary.axis} {sizes[family.rotary.axis]} is odd; rotary channels come in pairs.")


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
    for axis in family.axes:
        name = axis.name
        if name == "layers" or sizes[name] == old[name] or (axis.key and not axis.prunable):
            continue
        if family.rotary is not None and name == family.rotary.axis:
            step, keep[name] = _rotary_choice(shape, scores[name], sizes[name])
        elif name == "heads":
            continue  # `group` inside `kv_heads` holds the choice
        elif axis.per_layer:
            keep[name] = [top_units(scores[name][layer], sizes[name]).tolist() for layer in layers]
        else:
            keep[name] = top_units(scores[name], sizes[name]).tolist()
    plan = PrunePlan(
        family.name, dict(old), sizes, layers, keep, step, ranked_by, shape.params, 0
    )  # fmt: skip
    after = Shape.of(planned_config(shape, plan)).params
    return PrunePlan(**{**plan.to_json(), "params_after": after})


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


def _rotary_choice(shape: Shape, scores: Any, new_dim: int) -> tuple[int, list[int]]:
    """The progression of rotary pairs (0, k, 2k, ...) with the highest summed score, as channel numbers.

    Only progressions are the same function of position under another theta (frequencies theta^(-2i/d)).
    """
    rotary = shape.family.rotary
    assert rotary is not None
    kind = rope_type(shape.config)
    if kind not in rotary.types:
        raise ShapeError(f"head_dim cannot be cut under rope type '{kind}': its frequencies depend on head_dim itself.")
    old_dim = shape.sizes[rotary.axis]
    pairs, wanted = old_dim // 2, new_dim // 2
    pair_scores = np.asarray(scores, np.float64).reshape(-1, pairs).sum(0)
    longest = (pairs - 1) // (wanted - 1) if wanted > 1 else 1
    best = max(range(1, longest + 1), key=lambda step: float(pair_scores[: wanted * step : step][:wanted].sum()))
    chosen = np.arange(wanted) * best
    return best, rotary_pairs(old_dim, rotary.layout, chosen).tolist()


def rope_type(config: Mapping[str, Any]) -> str:
    """The rope scaling type a config names, under its old or new key."""
    for key in ("rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type"):
        value = lookup(config, key)
        if value is not None:
            return str(value)
    return "default"


def planned_config(shape: Shape, plan: PrunePlan) -> dict[str, Any]:
    """config.json of the planned model."""
    rotary = shape.family.rotary
    theta = None
    if rotary is not None and plan.sizes[rotary.axis] != shape.sizes[rotary.axis]:
        old = lookup(shape.config, "rope_parameters.rope_theta") or shape.config.get("rope_theta") or rotary.theta_default
        theta = rotary_theta(float(old), shape.sizes[rotary.axis], plan.sizes[rotary.axis], plan.rotary_step)
    return new_config(shape.config, shape.family, plan.sizes, plan.layers, theta)


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
