"""How scores are laid out: which axes have them, and in which dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from minitron_cli.checkpoint.rotary import unit_count
from minitron_cli.families.schema import Axis
from minitron_cli.shape import Shape

Array = npt.NDArray[np.float64]
Scores = Mapping[str, Array]
"""Axis to scores, higher is more important: (units,), per layer (layers, units), within another axis
(layers, outer units, units). `layers` is (layers,). A rotary axis holds one score per pair that turns, then one per
channel that does not: (layers, pairs + channels)."""

SCORES = "scores.safetensors"

CELLS = "nested.cells"
"""Scores of every cell of the family's nested axes: (layers, units of each, outermost first)."""

TOKENS = "experts.tokens"
"""Tokens that each routed expert was sent, (layers, experts)."""

STATISTICS = "statistics.safetensors"
"""Second moments: for each norm of the residual stream the energy of every channel (`ENERGY` and the weight's name),
and, where they were asked for, the directions of the stream as columns (`BASIS`) with their shares of the energy.
"""
ENERGY = "energy/"
BASIS = "directions.basis"
DIRECTIONS = "directions.energy"


def scored_axes(shape: Shape) -> list[Axis]:
    """Axes whose units are chosen by score (query heads are scored as members of their group)."""
    return list(shape.family.cut_axes)


def score_shape(shape: Shape, axis: Axis) -> tuple[int, ...]:
    """The dimensions of an axis's scores."""
    sizes, rotary = shape.sizes, shape.family.rotary
    if rotary is not None and axis.name == rotary.axis:
        return (sizes["layers"], unit_count(rotary, shape.config, sizes[axis.name]))
    outer = (sizes[axis.within],) if axis.within else ()
    return (sizes["layers"], *outer, sizes[axis.name]) if axis.per_layer else (*outer, sizes[axis.name])
