"""Everything one calibration pass gathers: statistics of every width axis at every tap, of the residual stream, and
block importance."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.depth import DepthScores
from minitron_cli.importance.experts import ExpertScores
from minitron_cli.importance.layout import Array
from minitron_cli.importance.nested import KIND as NESTED
from minitron_cli.importance.nested import NestedScores
from minitron_cli.importance.residual import KIND, ResidualStream, collected, norm_taps
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.importance.weighted import WeightedScores
from minitron_cli.importance.width import KINDS, WidthScores
from minitron_cli.models.experts import KIND as EXPERTS
from minitron_cli.models.experts import Passed, listening_experts
from minitron_cli.models.streaming import ResidentModel, StreamedModel
from minitron_cli.models.taps import PlacedTap, listening, place_taps
from minitron_cli.runtime.group import Group


class Gathered:
    """Running statistics, exact in fp64: the same sequences give the same numbers however they are batched.

    `batch` is how many sequences are passing now.
    """

    def __init__(self, model: ResidentModel | StreamedModel, config: ImportanceConfig) -> None:
        shape, self.batch = model.shape, 1
        scored, norms = list(place_taps(model.model, shape, KINDS)), norm_taps(model.model, shape)
        nested = list(place_taps(model.model, shape, (NESTED,)))
        self.taps = scored + norms + nested
        self.routed = list(place_taps(model.model, shape, (EXPERTS,)))
        self.blocks = list(place_taps(model.model, shape, ("block",)))
        self.width = WidthScores(shape, scored, config.batch_agg, config.seq_agg)
        further = collected(config, shape)
        weighted = "weighted" in further
        self.weighted = WeightedScores(shape, scored, config.batch_agg, config.seq_agg) if weighted else None
        self.nested = NestedScores(shape, nested, config.batch_agg, config.seq_agg)
        self.experts = ExpertScores(shape, self.routed, config.batch_agg, config.seq_agg, weighted=weighted)
        self.depth = DepthScores(shape["layers"])
        self.residual = ResidualStream(shape, norms, model.device, directions="directions" in further)

    @contextmanager
    def listening(self, layers: Collection[int | None] | None = None) -> Iterator[None]:
        """Listen at every tap, or at those of some layers (None: outside them) alone."""
        taps, routed = (
            [placed for placed in each if layers is None or placed.layer in layers] for each in (self.taps, self.routed)
        )
        with listening(taps, self.heard), listening_experts(routed, self._routed):
            yield

    def _routed(self, placed: PlacedTap, tokens: int, passes: Iterator[Passed]) -> None:
        self.experts.heard(placed, tokens, passes, self.batch)

    def heard(self, placed: PlacedTap, activation: torch.Tensor) -> None:
        """Take in what one tap heard, (batch, seq, channels); some stock classes flatten the first two on the way."""
        activation = activation.reshape(self.batch, -1, activation.shape[-1])
        if placed.kind == KIND:
            self.residual.heard(placed, activation)
            return
        if placed.kind == NESTED:
            self.nested.heard(placed, activation)
            return
        self.width.heard(placed, activation)
        if self.weighted is not None:
            self.weighted.heard(placed, activation)

    def _statistics(self) -> list[SampleStatistic]:
        weighted = self.weighted.statistics() if self.weighted is not None else []
        own = [*self.width.statistics.values(), *self.depth.statistic, *self.residual.energy.values()]
        return [*own, *self.nested.statistics.values(), *self.experts.statistics.values(), *weighted]

    def state(self) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Every accumulator by number, and the samples each has seen."""
        tensors: dict[str, torch.Tensor] = {}
        if self.residual.moment is not None:
            tensors["moment"] = self.residual.moment
        for number, statistic in enumerate(self._statistics()):
            tensors |= {f"{number}.first": statistic.first, f"{number}.second": statistic.second}
        return tensors, [statistic.count for statistic in self._statistics()]

    def restore(self, tensors: dict[str, torch.Tensor], counts: list[int]) -> None:
        """Take back what `state` gave."""
        if self.residual.moment is not None:
            self.residual.moment.copy_(tensors["moment"])
        for number, statistic in enumerate(self._statistics()):
            statistic.first, statistic.second = tensors[f"{number}.first"], tensors[f"{number}.second"]
            statistic.count = counts[number]

    def merge_over(self, group: Group) -> None:
        """Join the statistics of all processes, in the order of their ranks: every process ends with the same."""
        if group.size == 1:
            return
        self.residual.merge_over(group)
        for statistic in self._statistics():
            own = (torch.tensor([statistic.count]), statistic.first, statistic.second)
            merged = SampleStatistic(len(statistic.first), statistic.kind)
            for count, first, second in zip(*(group.gathered(each) for each in own), strict=True):
                merged.merge(SampleStatistic.of(statistic.kind, int(count), first, second))
            statistic.count, statistic.first, statistic.second = merged.count, merged.first, merged.second

    def scores(self) -> dict[str, Array]:
        """Width scores by axis, those that look at weights too (`ffn.contribution`), and `layers.bi`."""
        weighted = self.weighted.scores() if self.weighted is not None else {}
        routed = self.experts.scores()
        found = {**self.width.scores(), **self.nested.scores(), **routed, **weighted}
        return {**found, "layers.bi": self.depth.scores().numpy()}
