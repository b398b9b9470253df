"""Choose channels, heads and groups of Mamba and linear attention one after another (Minitron-SSM, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from minitron_cli.families.schema import Family
from minitron_cli.importance.layout import Array
from minitron_cli.importance.nested import energy_of


def choose_nested(
    family: Family,
    cells: Array,
    sizes: Mapping[str, int],
    layers: Sequence[int],
    having: Collection[int],
    choose: Callable[[str, Any, int], list[Any]],
) -> dict[str, list[Any]]:
    """Kept units of each nested axis in every kept layer: an axis is scored over what stays of those inside it.

    Args:
        cells: (layers, units of each nested axis, outermost first).
        sizes: the new sizes.
        having: the layers that have such units.
        choose: (axis, scores, count) to the units that stay.
    """
    keep: dict[str, list[Any]] = {name: [] for name in family.nested}
    for layer in layers:
        left = cells[layer : layer + 1].copy()
        for name in family.nested:
            units = choose(name, energy_of(family, name, left)[0], sizes[name]) if layer in having else []
            keep[name].append(units)
            if layer in having:
                left *= _mask(family, name, left.shape[1:], units)
    return keep


def _mask(family: Family, axis: str, shape: Sequence[int], units: list[Any]) -> Array:
    """1 at the cells of kept units, (1, units of each nested axis), 0 elsewhere."""
    order = family.nested[::-1]
    dims = [1] * len(shape)
    own = order.index(axis)
    dims[own] = shape[own]
    within = family.axis(axis).within
    if not within:
        mask = np.zeros(dims)
        mask.reshape(-1)[units] = 1
        return mask[None]
    outer = order.index(within)
    assert outer < own
    dims[outer] = shape[outer]
    mask = np.zeros((shape[outer], shape[own]))
    np.put_along_axis(mask, np.asarray(units), 1, axis=1)
    return mask.reshape(dims)[None]
