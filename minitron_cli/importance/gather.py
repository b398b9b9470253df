"""Everything one calibration pass gathers: statistics of every width axis at every tap, and block importance."""

from __future__ import annotations

import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.depth import DepthScores
from minitron_cli.importance.layout import Array
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.importance.width import KINDS, WidthScores
from minitron_cli.models.layerwise import LayerwiseModel
from minitron_cli.models.taps import place_taps
from minitron_cli.runtime.group import Group


class Gathered:
    """Running statistics, exact in fp64: the same sequences give the same numbers however they are batched."""

    def __init__(self, model: LayerwiseModel, config: ImportanceConfig) -> None:
        shape = model.shape
        self.taps = list(place_taps(model.model, shape, KINDS))
        self.blocks = list(place_taps(model.model, shape, ("block",)))
        self.width = WidthScores(shape, self.taps, config.batch_agg, config.seq_agg)
        self.depth = DepthScores(shape["layers"])

    def _statistics(self) -> list[SampleStatistic]:
        return [*self.width.statistics.values(), *self.depth.statistic]

    def state(self) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Every accumulator by number, and the samples each has seen."""
        tensors: dict[str, torch.Tensor] = {}
        for number, statistic in enumerate(self._statistics()):
            tensors |= {f"{number}.first": statistic.first, f"{number}.second": statistic.second}
        return tensors, [statistic.count for statistic in self._statistics()]

    def restore(self, tensors: dict[str, torch.Tensor], counts: list[int]) -> None:
        """Take back what `state` gave."""
        for number, statistic in enumerate(self._statistics()):
            statistic.first, statistic.second = tensors[f"{number}.first"], tensors[f"{number}.second"]
            statistic.count = counts[number]

    def merge_over(self, group: Group) -> None:
        """Join the statistics of all processes, in the order of their ranks: every process ends with the same."""
        if group.size == 1:
            return
        for statistic in self._statistics():
            own = (torch.tensor([statistic.count]), statistic.first, statistic.second)
            merged = SampleStatistic(len(statistic.first), statistic.kind)
            for count, first, second in zip(*(group.gathered(each) for each in own), strict=True):
                merged.merge(SampleStatistic.of(statistic.kind, int(count), first, second))
            statistic.count, statistic.first, statistic.second = merged.count, merged.first, merged.second

    def scores(self) -> dict[str, Array]:
        """Width scores by axis, and `layers.bi`."""
        return {**self.width.scores(), "layers.bi": self.depth.scores().numpy()}
