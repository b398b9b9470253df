"""A family of sizes: what each is cut from.

A large cut loses less in two steps, with a distillation between them (Minitron, Table 14: 15B to 8B to 4B beats 15B to
4B at equal tokens), while the original stays the best teacher. So each size is cut from the student of the nearest
larger one that it fits inside.
"""

from __future__ import annotations

from collections.abc import Mapping

from minitron_cli.errors import ShapeError
from minitron_cli.prune.sizes import complete_target
from minitron_cli.shape import Shape


def fits_inside(smaller: Shape, larger: Shape) -> bool:
    """Whether one shape can be cut out of another: every axis at most as large, and the cut keeps the class's rules."""
    if any(size > larger.sizes.get(axis, size) for axis, size in smaller.sizes.items()):
        return False
    try:
        complete_target(larger, cut_sizes(smaller, larger))
    except ShapeError:
        return False
    return True


def cut_sizes(smaller: Shape, larger: Shape) -> dict[str, int]:
    """The sizes to ask for, of axes that differ and can be asked for."""
    axes = {axis.name for axis in larger.family.axes if axis.prunable}
    return {axis: size for axis, size in smaller.sizes.items() if axis in axes and size != larger.sizes[axis]}


def origins(chosen: Mapping[str, Shape]) -> dict[str, str | None]:
    """The size whose student each size is cut from; None for the original. `chosen` lists the largest first."""
    found: dict[str, str | None] = {}
    for size, shape in chosen.items():
        larger = [other for other in found if fits_inside(shape, chosen[other])]
        found[size] = larger[-1] if larger else None
    return found
