"""Aggregators over a sequence of scores S: mean = (1/n) sum |S|, l2 = sqrt(sum S^2), var = (1/n) sum (S - mean)^2
(Minitron, section 2.2). One reduction over tokens per sample, then one running statistic over samples."""

from __future__ import annotations

import torch


def reduce_sequence(activations: torch.Tensor, kind: str) -> torch.Tensor:
    """Aggregate over tokens: (batch, seq, units) to (batch, units), in fp32."""
    values = activations.float()
    if kind == "mean":
        return values.abs().mean(dim=1)
    if kind == "l2":
        return values.square().sum(dim=1).sqrt()
    return values.var(dim=1, correction=0)


class SampleStatistic:
    """A running aggregate over samples, exact in fp64: any split into batches gives the same number.

    State is two vectors and a count: the running mean and centred squares (Welford, merged by Chan) for "var",
    the sum of |S| for "mean", the sum of squares for "l2".
    """

    def __init__(self, units: int, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.first = torch.zeros(units, dtype=torch.float64)
        self.second = torch.zeros(units, dtype=torch.float64)

    @classmethod
    def of(cls, kind: str, count: int, first: torch.Tensor, second: torch.Tensor) -> SampleStatistic:
        """A statistic in a known state."""
        statistic = cls(len(first), kind)
        statistic.count, statistic.first, statistic.second = count, first, second
        return statistic

    def add(self, samples: torch.Tensor) -> None:
        """Take in per-sample scores, (batch, units)."""
        values = samples.double().cpu()
        if self.kind == "mean":
            for row in values:
                self.first += row.abs()
        elif self.kind == "l2":
            for row in values:
                self.second += row.square()
        else:
            for number, row in enumerate(values, self.count + 1):
                delta = row - self.first
                self.first += delta / number
                self.second += delta * (row - self.first)
        self.count += len(values)

    def value(self) -> torch.Tensor:
        """The aggregate over all samples so far, (units,) fp64."""
        if self.kind == "mean":
            return self.first / self.count
        if self.kind == "l2":
            return self.second.sqrt()
        return self.second / self.count

    def merge(self, other: SampleStatistic) -> None:
        """Take in the samples another statistic has seen (Chan, Golub and LeVeque 1979 for the variance)."""
        if self.kind == "var" and other.count:
            both = self.count + other.count
            delta = other.first - self.first
            self.first = self.first + delta * (other.count / both)
            self.second = self.second + other.second + delta.square() * (self.count * other.count / both)
        else:
            self.first, self.second = self.first + other.first, self.second + other.second
        self.count += other.count
