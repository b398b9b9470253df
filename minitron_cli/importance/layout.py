"""How scores are laid out: which axes have them, and in which dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from minitron_cli.families.schema import Axis
from minitron_cli.shape import Shape

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Array]
"""Axis to scores, higher is more important: (units,), per layer (layers, units), within another axis
(layers, outer units, units). `layers` is (layers,). A rotary axis holds one score per pair: (layers, pairs)."""

SCORES = "scores.safetensors"


def scored_axes(shape: Shape) -> list[Axis]:
    """Axes whose units are chosen by score (query heads are scored as members of their group)."""
    named = {axis.name for axis in shape.family.axes if axis.prunable or axis.within}
    return [axis for axis in shape.family.axes if axis.name in named - {"heads", "layers"}]


def score_shape(shape: Shape, axis: Axis) -> tuple[int, ...]:
    """The dimensions of an axis's scores."""
    sizes, rotary = shape.sizes, shape.family.rotary
    if rotary is not None and axis.name == rotary.axis:
        return (sizes["layers"], sizes[axis.name] // 2)
    outer = (sizes[axis.within],) if axis.within else ()
    return (sizes["layers"], *outer, sizes[axis.name]) if axis.per_layer else (*outer, sizes[axis.name])
