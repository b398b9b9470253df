"""Width scores that look at what a channel does behind it: its activation times the norm of the weights it leaves by.

contribution   the scores of `width` on weighted activations (Puzzle, arXiv 2411.19146)
fluctuation    their variance over all tokens, summed over the channels of a unit: a channel that hardly varies can be
               replaced by a constant (FLAP, arXiv 2312.11983)
"""

from __future__ import annotations

import torch

from minitron_cli.checkpoint.surgery import labels
from minitron_cli.families.expression import parse
from minitron_cli.importance.layout import Array, score_shape
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.importance.width import ENDS, WidthScores
from minitron_cli.models.taps import PlacedTap
from minitron_cli.shape import Shape


class WeightedScores:
    """Running statistics at the inputs of the projections that end attention and MLP, where these are plain linears."""

    def __init__(self, shape: Shape, taps: list[PlacedTap], batch_agg: str, seq_agg: str) -> None:
        self.shape = shape
        declared = {name: tensor for name, tensor, _ in shape.family.expected(shape.config)}
        self._inputs: dict[PlacedTap, int] = {}
        for placed in taps:
            tensor = declared.get(shape.family.on_disk(placed.tap.module.format(layer=placed.layer)) + ".weight")
            if (
                placed.kind in ENDS
                and tensor is not None
                and sorted(tensor.dims) == sorted(("hidden", placed.tap.dims))
            ):
                self._inputs[placed] = tensor.dims.index(placed.tap.dims)
        self.contribution = WidthScores(shape, list(self._inputs), batch_agg, seq_agg)
        # Sequences are equally long, so the variance over tokens is the mean of theirs and the variance of their means.
        self.within, self.between = (
            {placed: SampleStatistic(self._channels(placed), kind) for placed in self._inputs}
            for kind in ("mean", "var")
        )

    def _channels(self, placed: PlacedTap) -> int:
        return len(labels(parse(placed.tap.dims), self.shape.sizes, ""))

    def statistics(self) -> list[SampleStatistic]:
        """Every accumulator."""
        return [*self.contribution.statistics.values(), *self.within.values(), *self.between.values()]

    def heard(self, placed: PlacedTap, activation: torch.Tensor) -> None:
        """Take in one activation, (batch, seq, channels)."""
        if placed not in self._inputs:
            return
        weight = placed.module.weight
        assert isinstance(weight, torch.Tensor)
        weighted = activation.float() * weight.float().norm(dim=1 - self._inputs[placed])
        self.contribution.heard(placed, weighted)
        self.within[placed].add(weighted.var(dim=1, correction=0))
        self.between[placed].add(weighted.mean(dim=1))

    def scores(self) -> dict[str, Array]:
        """Scores per axis, named `axis.contribution` and `axis.fluctuation`."""
        found = {f"{name}.contribution": values for name, values in self.contribution.scores().items()}
        for axis in self.contribution.axes.values():
            heard = [placed for placed in self._inputs if axis in self.contribution.scored(placed)]
            if heard:
                total = torch.zeros(score_shape(self.shape, axis), dtype=torch.float64)
                for placed in heard:
                    variance = self.within[placed].value() + self.between[placed].value()
                    target = total[placed.layer] if axis.per_layer else total
                    target.view(-1).index_add_(0, self.contribution.units[placed.tap.dims, axis.name], variance)
                found[f"{axis.name}.fluctuation"] = total.numpy()
        return found
