"""Width scores from activations (Minitron, section 2.2): what each head, neuron and channel puts out.

A unit's activation at a token is its value where it is one channel (a neuron, a hidden channel), and the L2 norm over
its channels where it is several (a query head, a KV group, a value channel shared by a group's heads).
"""

from __future__ import annotations

import torch

from minitron_cli.checkpoint.surgery import labels
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Axis
from minitron_cli.importance.layout import Array, score_shape, scored_axes
from minitron_cli.importance.statistics import SampleStatistic, reduce_sequence
from minitron_cli.models.taps import PlacedTap
from minitron_cli.shape import Shape

KINDS = ("hidden", "attention", "ffn", "shared_ffn", "q_rank", "kv_rank", "expert_latent")
"""Taps that carry width scores."""

ENDS = ("attention", "ffn", "shared_ffn")
"""Those of them on what enters the projections that write into the residual stream, in the order of a layer."""


class WidthScores:
    """Running statistics of every scored axis at every tap."""

    def __init__(self, shape: Shape, taps: list[PlacedTap], batch_agg: str, seq_agg: str) -> None:
        self.shape, self.seq_agg = shape, seq_agg
        self.axes = {axis.name: axis for axis in scored_axes(shape)}
        self.statistics: dict[tuple[str, str, int], SampleStatistic] = {}
        self.units: dict[tuple[str, str], torch.Tensor] = {}
        for placed in taps:
            for axis in self.scored(placed):
                unit = torch.from_numpy(labels(parse(placed.tap.dims), shape.sizes, axis.name, axis.within))
                self.units[placed.tap.dims, axis.name] = unit
                self.statistics[self._key(placed, axis)] = SampleStatistic(int(unit.max()) + 1, batch_agg)

    def scored(self, placed: PlacedTap) -> list[Axis]:
        """Axes this tap gives scores to; a rotary axis has none in activations (its choice is a progression)."""
        rotary = self.shape.family.rotary
        found = axes(parse(placed.tap.dims)) & self.axes.keys() - ({rotary.axis} if rotary else set())
        return [self.axes[name] for name in sorted(found)]

    @staticmethod
    def _key(placed: PlacedTap, axis: Axis) -> tuple[str, str, int]:
        return axis.name, placed.tap.module, -1 if placed.layer is None else placed.layer

    def heard(self, placed: PlacedTap, activation: torch.Tensor) -> None:
        """Take in one activation, (batch, seq, channels)."""
        for axis in self.scored(placed):
            unit = self.units[placed.tap.dims, axis.name]
            samples = reduce_sequence(unit_activations(activation, unit), self.seq_agg)
            self.statistics[self._key(placed, axis)].add(samples)

    def scores(self) -> dict[str, Array]:
        """Scores per axis; taps and layers are summed for an axis chosen once for the whole model."""
        totals = {
            name: torch.zeros(score_shape(self.shape, axis), dtype=torch.float64) for name, axis in self.axes.items()
        }
        for (name, _, layer), statistic in self.statistics.items():
            target = totals[name][layer] if self.axes[name].per_layer else totals[name]
            target += statistic.value().view(target.shape)
        heard = {name for name, _, _ in self.statistics}
        return {name: total.numpy() for name, total in totals.items() if name in heard}


def unit_activations(activation: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Activations per unit: (batch, seq, channels) and the unit of each channel (channels,) to (batch, seq, units)."""
    units = int(unit.max()) + 1
    if units == len(unit):
        return activation if bool((unit == torch.arange(units)).all()) else activation[..., unit.argsort()]
    squares = activation.float().square()
    summed = squares.new_zeros(*squares.shape[:-1], units)
    return summed.index_add_(-1, unit.to(squares.device), squares).sqrt()
