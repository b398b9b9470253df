"""Candidate shapes: every point of a grid whose parameters fall into the window and that the stock class accepts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.errors import InputError, ShapeError
from minitron_cli.prune.sizes import complete_target
from minitron_cli.shape import Shape

SMALLEST_SHARE = {"layers": 0.75, "hidden": 0.5, "ffn": 0.25}
"""Automatic grids cut each axis at most to this share. Query and KV heads stay: Minitron found that pruning ffn and
hidden and keeping heads is better at equal size (P2), and deep cuts cost more than wide ones (P1 table 1)."""


@dataclass(frozen=True)
class Candidate:
    """A feasible shape: the axes that differ from the original, and its parameters."""

    target: Mapping[str, int]
    shape: Shape

    @property
    def name(self) -> str:
        return self.shape.label()


def automatic_grid(shape: Shape) -> dict[str, list[int]]:
    """Hardware-friendly sizes per axis: multiples of a power of two about a sixteenth of the axis (at most 256)."""
    grid: dict[str, list[int]] = {}
    for axis, share in SMALLEST_SHARE.items():
        if axis not in shape.sizes or not shape.family.axis(axis).prunable:
            continue
        full = shape[axis]
        step = 1 if axis == "layers" else min(256, max(1, 1 << (max(full // 16, 1).bit_length() - 1)))
        values = {value for value in range(step, full + 1, step) if value >= share * full} | {full}
        grid[axis] = sorted(values, reverse=True)
    return grid


def enumerate_candidates(
    shape: Shape, grid: Mapping[str, Sequence[int]], low: int, high: int, count: str
) -> list[Candidate]:
    """All feasible points, most parameters first.

    Raises:
        ShapeError: a grid value is larger than the original, or the family is not prunable.
        InputError: no point is feasible; says what the window and the grid's extremes are.
    """
    axes = list(grid)
    for axis, values in grid.items():
        check_largest(shape, axis, max(values))
    found: list[tuple[int, Candidate]] = []
    extremes: list[int] = []
    for point in itertools.product(*grid.values()):
        target = dict(zip(axes, point, strict=True))
        try:
            sizes = complete_target(shape, target)
        except ShapeError:
            continue  # a divisibility rule of the stock class: simply not a point of the space
        layers = list(range(sizes["layers"]))
        candidate = Shape.of(new_config(shape.config, shape.family, sizes, layers, None))
        params = candidate.params if count == "total" else candidate.params_non_embedding
        extremes.append(params)
        if low <= params <= high:
            found.append((params, Candidate({a: v for a, v in target.items() if v != shape[a]}, candidate)))
    if not found:
        reach = (
            f"the grid reaches {min(extremes):,} to {max(extremes):,}" if extremes else "no point of the grid is valid"
        )
        raise InputError(
            f"No candidate has {low:,} to {high:,} {count} parameters; {reach}. Widen --tolerance or --grid."
        )
    found.sort(key=lambda item: (-item[0], item[1].name))
    return [candidate for _, candidate in found]


def check_largest(shape: Shape, axis: str, value: int) -> None:
    """The largest value of one axis must not exceed the original; told at once, not skipped.

    Raises:
        ShapeError: it does.
    """
    family_axis = shape.family.axis(axis)
    if value > shape[axis]:
        raise ShapeError(f"--grid {axis}: {value} is larger than the original {shape[axis]}; pruning only removes.")
    if not family_axis.prunable:
        raise ShapeError(f"--grid {axis}: {shape.family.name} cannot cut it ({family_axis.why_not or 'derived'}).")


def spread(candidates: Sequence[Candidate], limit: int) -> list[Candidate]:
    """At most `limit` candidates: the largest of each (layers, hidden) first, then the next largest of each."""
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.shape["layers"], candidate.shape["hidden"]), []).append(candidate)
    rounds = itertools.zip_longest(*groups.values())
    return [candidate for each in rounds for candidate in each if candidate is not None][:limit]
