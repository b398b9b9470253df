"""Read what users write for `--grid` and `--max-cut`, and make grids from hardware multiples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from minitron_cli.errors import ConfigError, ShapeError
from minitron_cli.prune.sizes import members
from minitron_cli.shape import Shape

AUTO = "auto"
LARGEST_CUT = {"layers": 0.25, "hidden": 0.5, "ffn": 0.75, "experts": 0.5, "expert_ffn": 0.5}
"""Axes of the automatic grid, and how much of each it cuts at most. Query and KV heads stay: Minitron found that
pruning ffn and hidden and keeping heads is better at equal size (P2), and deep cuts cost more than wide ones (P1
table 1)."""
OTHER_CUT = 0.5
LARGEST_STEP = 1024

_FACTOR = re.compile(r"(\d+(?:\.\d+)?)x")
_SPAN = re.compile(r"(\d+)\.\.(\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class Values:
    """The values of one axis, ascending: sizes, or factors of each candidate's hidden.

    `named` are those that were written one by one; the others come from ranges and may be left out.
    """

    entries: tuple[Fraction, ...]
    factors: bool = False
    named: frozenset[Fraction] = frozenset()

    def text(self, entry: Fraction) -> str:
        """As the user wrote it."""
        return f"{float(entry):g}x" if self.factors else str(entry)

    def without(self, left_out: Sequence[Fraction]) -> Values:
        """The other values."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry not in left_out))


Grid = Mapping[str, Values]


def plain_grid(sizes: Mapping[str, Sequence[int]]) -> dict[str, Values]:
    """A grid of sizes whose impossible values may be left out."""
    return {axis: Values(tuple(sorted(Fraction(value) for value in set(values)))) for axis, values in sizes.items()}


def read_grid(entries: Sequence[str], shape: Shape, cuts: Mapping[str, float]) -> dict[str, Values]:
    """`axis=values`: comma lists of sizes, `lo..hi`, `lo..hi/step`; `2.5x` of hidden; `auto`.

    Raises:
        ConfigError: an unknown axis, an unreadable value, or sizes that differ between layers.
        ShapeError: the family cannot cut the axis, or a value is larger than the original.
    """
    grid: dict[str, Values] = {}
    for entry in entries:
        axis, equals, text = (part.strip() for part in entry.partition("="))
        if entry.strip() == AUTO:
            found = automatic_grid(shape, cuts)
        else:
            axis = axis.replace("-", "_")
            _require_uniform(entry, shape)
            if not equals or axis not in shape.sizes:
                axes = ", ".join(axis.name for axis in shape.family.axes if axis.prunable)
                raise ConfigError(f"--grid {entry}: write axis=values with axis one of {axes}, or auto.")
            found = {axis: _read_values(entry, axis, text, shape, cuts)}
        twice = sorted(grid.keys() & found.keys())
        if twice:
            raise ConfigError(f"--grid names {twice[0]} twice; give each axis once, with commas between its values.")
        grid |= found
    for axis, values in grid.items():
        _require_cut(shape, axis, values)
    return grid


def _require_uniform(entry: str, shape: Shape) -> None:
    if not re.search(r"[\[\]@]|per-layer|per_layer", entry):
        return
    axis = re.split(r"[\[=@]", entry.replace("-", "_"))[0].strip()
    key = shape.family.axis(axis).key if axis in shape.sizes else ""
    raise ConfigError(
        f"--grid {entry}: sizes are the same in every layer, because the stock {shape.family.name} class reads one "
        f"{key or 'number'} from config.json for all of them and could not load anything else; write {axis}=VALUES."
    )


def _read_values(entry: str, axis: str, text: str, shape: Shape, cuts: Mapping[str, float]) -> Values:
    if text == AUTO:
        return automatic_values(shape, axis, cuts)
    sizes: set[Fraction] = set()
    named: set[Fraction] = set()
    factors: set[Fraction] = set()
    for part in (part.strip() for part in text.split(",")):
        span, factor = _SPAN.fullmatch(part), _FACTOR.fullmatch(part)
        if span:
            low, high, step = int(span[1]), int(span[2]), int(span[3] or 1)
            if step < 1 or low < 1 or low > high:
                raise ConfigError(f"--grid {entry}: the range {part} is empty or starts at 0.")
            if high > shape[axis]:
                raise ShapeError(
                    f"--grid {entry}: {high} is larger than the original {shape[axis]}; pruning only removes."
                )
            sizes |= {Fraction(value) for value in range(low, high + 1, step)}
        elif factor and Fraction(factor[1]) > 0:
            factors.add(Fraction(factor[1]))
        elif re.fullmatch(r"\d+", part) and int(part) > 0:
            named.add(Fraction(int(part)))
        else:
            raise ConfigError(
                f"--grid {entry}: {part!r} is not a size, a range such as 29..32, or a factor such as 3x."
            )
    if factors and (sizes or named or axis in ("hidden", "layers")):
        raise ConfigError(
            f"--grid {entry}: factors are multiples of hidden; they stand neither beside sizes nor for hidden, layers."
        )
    if factors:
        return Values(tuple(sorted(factors)), factors=True, named=frozenset(factors))
    return Values(tuple(sorted(sizes | named)), named=frozenset(named))


def _require_cut(shape: Shape, axis: str, values: Values) -> None:
    family_axis = shape.family.axis(axis)
    largest = values.entries[-1]
    if not values.factors and largest > shape[axis]:
        raise ShapeError(f"--grid {axis}: {largest} is larger than the original {shape[axis]}; pruning only removes.")
    if not family_axis.prunable and any(values.factors or entry != shape[axis] for entry in values.entries):
        raise ShapeError(f"--grid {axis}: {shape.family.name} cannot cut it ({family_axis.why_not or 'derived'}).")


def read_cuts(entries: Sequence[str]) -> dict[str, float]:
    """The largest cut of each axis in automatic grids: `50%` for all, `layers=25%` for one; "" holds for the rest.

    Raises:
        ConfigError: not a share from 0 to below 1.
    """
    cuts: dict[str, float] = {}
    for entry in entries:
        axis, equals, text = entry.rpartition("=")
        number = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
        share = float(number[1]) / (100 if number[2] else 1) if number else -1.0
        if not 0 <= share < 1 or (equals and not axis.strip()):
            raise ConfigError(f"--max-cut {entry}: write a share below 100%, such as 50% or layers=25%.")
        cuts[axis.strip().replace("-", "_")] = share
    return cuts


def automatic_grid(shape: Shape, cuts: Mapping[str, float] | None = None) -> dict[str, Values]:
    """Layers, hidden and ffn, and every axis that `cuts` names: hardware-friendly sizes.

    Raises:
        ConfigError: `cuts` names an axis that the family cannot cut.
    """
    cuts = cuts or {}
    for axis in cuts:
        if axis and (axis not in shape.sizes or not shape.family.axis(axis).prunable):
            able = ", ".join(axis.name for axis in shape.family.axes if axis.prunable)
            raise ConfigError(f"--max-cut {axis}: {shape.family.name} can cut {able}.")
    wanted = [
        axis.name
        for axis in shape.family.axes
        if axis.name not in shape.absent and (axis.name in LARGEST_CUT or axis.name in cuts or _bound(shape, axis.name))
    ]
    return {axis: automatic_values(shape, axis, cuts) for axis in wanted if shape.family.axis(axis).prunable}


def _bound(shape: Shape, axis: str) -> bool:
    """Whether an axis is the first factor of a size that must be a multiple of one of the automatic grid."""
    family = shape.family
    return any(
        rule.divisor in LARGEST_CUT and str(family.axis(rule.axis).default).split(" * ")[0] == axis
        for rule in family.divides
    )


def automatic_values(shape: Shape, axis: str, cuts: Mapping[str, float]) -> Values:
    """The original size, and multiples of `hardware_step` down to the largest cut."""
    full = shape[axis]
    cut = cuts.get(axis, cuts.get("", LARGEST_CUT.get(axis, OTHER_CUT)))
    step = hardware_step(shape, axis)
    sizes = {value for value in range(step, full + 1, step) if value >= (1 - cut) * full} | {full}
    if axis in _outer(shape):
        sizes = {value for value in sizes if full % value == 0}
    return Values(tuple(Fraction(value) for value in sorted(sizes)))


def _outer(shape: Shape) -> dict[str, str]:
    """Axes whose units hold those of another, to that other: KV heads, groups of Mamba heads, key heads."""
    return {"kv_heads": "heads", **{under: over for over, under in members(shape.family).values()}}


def hardware_step(shape: Shape, axis: str) -> int:
    """Layers and KV heads (and other groups) one by one; query heads and heads of groups by whole groups; channels by
    the largest power of two that is at most a sixteenth of the axis, and at most 1024: 256 for a hidden size of 4096.
    """
    outer = _outer(shape)
    if axis == "layers" or axis in outer:
        return 1
    for under, over in outer.items():
        if axis == over and shape.sizes.get(under, 0) < shape[axis]:
            return shape.sizes.get(under, 0) or 1
    return min(LARGEST_STEP, 1 << (max(shape[axis] // 16, 1).bit_length() - 1))
