"""Scores of Mamba and linear attention: cells of (group, head, channel), from which a cut chooses step by step.

Minitron-SSM (arXiv 2504.11409, section 3): activations are read where the projection W_x puts them out, before the
convolution. Channels are scored over all heads; heads, inside their group, over the channels that stay. The second step
depends on how many channels stay, so the cells are stored, and `prune` takes the steps.
"""

from __future__ import annotations

import math

import torch

from minitron_cli.checkpoint.surgery import of_term
from minitron_cli.families.expression import parse
from minitron_cli.families.schema import Family
from minitron_cli.importance.layout import CELLS, Array
from minitron_cli.importance.statistics import SampleStatistic, reduce_sequence
from minitron_cli.models.taps import PlacedTap
from minitron_cli.shape import Shape

KIND = "nested"
"""Kind of the taps."""


class NestedScores:
    """Running statistics of every cell of every layer that has any."""

    def __init__(self, shape: Shape, taps: list[PlacedTap], batch_agg: str, seq_agg: str) -> None:
        self.shape, self.seq_agg = shape, seq_agg
        self.sizes = [shape[name] for name in reversed(shape.family.nested)]
        self.statistics = {placed.layer: SampleStatistic(math.prod(self.sizes), batch_agg) for placed in taps}
        self._part = {
            placed.tap: torch.from_numpy(of_term(parse(placed.tap.dims), shape.sizes, placed.tap.part))
            for placed in taps
        }

    def heard(self, placed: PlacedTap, activation: torch.Tensor) -> None:
        """Take in what a projection puts out, (batch, seq, channels)."""
        part = activation[..., self._part[placed.tap].to(activation.device)]
        self.statistics[placed.layer].add(reduce_sequence(part, self.seq_agg))

    def scores(self) -> dict[str, Array]:
        """The cells, (layers, units of each nested axis, outermost first), and the scores of these axes alone."""
        if not self.statistics:
            return {}
        cells = torch.zeros(self.shape["layers"], *self.sizes, dtype=torch.float64)
        for layer, statistic in self.statistics.items():
            assert layer is not None
            cells[layer] = statistic.value().view(self.sizes)
        found = cells.numpy()
        alone = {name: energy_of(self.shape.family, name, found) for name in self.shape.family.nested}
        return {CELLS: found, **alone}


def energy_of(family: Family, axis: str, cells: Array) -> Array:
    """Scores of one nested axis: the L2 norm over all cells of a unit, (layers, outer units, units)."""
    order = family.nested[::-1]
    kept = {axis, family.axis(axis).within}
    others = tuple(number for number, name in enumerate(order, 1) if name not in kept)
    scores: Array = (cells**2).sum(axis=others) ** 0.5
    return scores
