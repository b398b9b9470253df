"""Scores of routed experts and of the neurons inside them.

frequency    share of all tokens that the router sends an expert
activation   L2 norm of what it puts out, over all tokens (0 where it is not asked), aggregated as other width scores
reap         mean over its own tokens of router weight times that norm (REAP, arXiv 2510.13999)

A neuron's activation is its value where its expert is asked, else 0. Weighted by what it leaves by, as in `weighted`:
its contribution, and its fluctuation over the tokens that its expert was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minitron_cli.importance.layout import TOKENS, Array
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.models.experts import Passed, outgoing_norms
from minitron_cli.models.taps import PlacedTap
from minitron_cli.shape import Shape

COUNT, WEIGHTED, OUTPUT, NEURONS = "count", "weighted", "output", "neurons"
"""What is summed or aggregated over sequences: tokens, router weight times norm, norm, activations."""

VALUES, SQUARES, NORMS = "values", "squares", "norms"
"""Of neurons, where weighted scores are gathered: sums of values and of squares; norms of outgoing weights."""


class ExpertScores:
    """Running statistics of every layer that has routed experts."""

    def __init__(
        self, shape: Shape, taps: list[PlacedTap], batch_agg: str, seq_agg: str, *, weighted: bool = False
    ) -> None:
        self.shape, self.seq_agg, self.weighted = shape, seq_agg, weighted
        # A factor on activations is squared by each variance.
        self.power = 2.0 ** [batch_agg, seq_agg].count("var")
        self.layers = [placed.layer for placed in taps if placed.layer is not None]
        self.statistics: dict[tuple[str, int], SampleStatistic] = {}
        for layer in self.layers:
            experts = shape["experts"]
            self.statistics[COUNT, layer] = SampleStatistic(experts, "mean")
            self.statistics[WEIGHTED, layer] = SampleStatistic(experts, "mean")
            self.statistics[OUTPUT, layer] = SampleStatistic(experts, batch_agg)
            kinds = {NEURONS: batch_agg}
            if weighted:
                # The running mean of a variance keeps signs, which sums of absolute values do not.
                kinds |= {VALUES: "var", SQUARES: "mean", NORMS: "mean"}
            for kind, aggregator in kinds.items():
                self.statistics[kind, layer] = SampleStatistic(experts * shape["expert_ffn"], aggregator)

    def heard(self, placed: PlacedTap, tokens: int, passes: Iterator[Passed], batch: int) -> None:
        """Take in one pass of `batch` sequences through one layer's experts."""
        assert placed.layer is not None
        seq, experts, width = tokens // batch, self.shape["experts"], self.shape["expert_ffn"]
        device = next(placed.module.parameters()).device
        sums = {kind: torch.zeros(batch, experts, device=device) for kind in (COUNT, WEIGHTED)}
        output = _Sequences(torch.zeros(3, batch, experts, 1, device=device), seq, self.seq_agg)
        neurons = _Sequences(torch.zeros(3, batch, experts, width, device=device), seq, self.seq_agg)
        for each in passes:
            sample = each.tokens // seq
            norms = each.outputs.float().norm(dim=-1)
            sums[COUNT][:, each.expert].index_add_(0, sample, torch.ones_like(norms))
            sums[WEIGHTED][:, each.expert].index_add_(0, sample, each.weights.float() * norms)
            output.add(each.expert, sample, norms[:, None])
            neurons.add(each.expert, sample, each.neurons.float())
        for kind, total in sums.items():
            self.statistics[kind, placed.layer].add(total)
        self.statistics[OUTPUT, placed.layer].add(output.reduced())
        self.statistics[NEURONS, placed.layer].add(neurons.reduced())
        if self.weighted:
            _, squares, values = neurons.sums.flatten(2)
            self.statistics[SQUARES, placed.layer].add(squares)
            self.statistics[VALUES, placed.layer].add(values)
            norms = self.statistics[NORMS, placed.layer]
            if not norms.count:
                norms.add(outgoing_norms(placed.module).view(1, -1))

    def scores(self) -> dict[str, Array]:
        """`experts` by REAP, `experts.frequency`, `experts.activation`, the counts of tokens, and `expert_ffn`."""
        if not self.layers:
            return {}
        count, weighted, output, neurons = (self._by_layer(kind) for kind in (COUNT, WEIGHTED, OUTPUT, NEURONS))
        passed = count.sum(axis=1, keepdims=True) / self.shape.experts_per_token
        return {
            "experts": weighted / np.maximum(count, 1),
            "experts.frequency": count / np.maximum(passed, 1),
            "experts.activation": output,
            TOKENS: count,
            "expert_ffn": neurons.reshape(*output.shape, -1),
            **(self._weighted(count, neurons) if self.weighted else {}),
        }

    def _weighted(self, count: Array, neurons: Array) -> dict[str, Array]:
        """Scores of neurons that look at what they leave by, from (layers, experts) tokens and their activations."""
        norms, squares = self._by_layer(NORMS), self._by_layer(SQUARES)
        samples = self.statistics[VALUES, self.layers[0]].count
        tokens = np.maximum(count, 1).repeat(self.shape["expert_ffn"], axis=1)
        variance = squares / tokens - (self._by_layer(VALUES) * samples / tokens) ** 2
        shape = (*count.shape, -1)
        return {
            "expert_ffn.contribution": (neurons * norms**self.power).reshape(shape),
            "expert_ffn.fluctuation": (np.maximum(variance, 0) * norms**2).reshape(shape),
        }

    def tokens(self) -> dict[int, list[int]]:
        """Tokens that each expert was sent, by layer."""
        return {layer: self.statistics[COUNT, layer].first.long().tolist() for layer in self.layers}

    def _by_layer(self, kind: str) -> Array:
        """(layers, units), sums (means of sequences for `VALUES`) or aggregates; 0 in layers without experts."""
        whole = kind in (COUNT, WEIGHTED, VALUES, SQUARES)
        each = {layer: self.statistics[kind, layer] for layer in self.layers}
        found = {layer: statistic.first if whole else statistic.value() for layer, statistic in each.items()}
        nothing = torch.zeros_like(found[self.layers[0]])
        by_layer: Array = torch.stack([found.get(layer, nothing) for layer in range(self.shape["layers"])]).numpy()
        return by_layer


def accumulator_bytes(shape: Shape, batch: int, *, weighted: bool) -> int:
    """Memory that the statistics of neurons take: fp64 for every layer, and fp32 sums of one batch."""
    neurons = shape.sizes.get("experts", 0) * shape.sizes.get("expert_ffn", 0)
    kinds = 4 if weighted else 1
    return neurons * (len(shape.layers_with("experts")) * kinds * 2 * 8 + 3 * batch * 4)


class _Sequences:
    """Sums over the tokens of each sequence, (absolute values, squares, values; batch, experts, channels); `kind` as
    aggregators."""

    def __init__(self, sums: Tensor, seq: int, kind: str) -> None:
        self.sums, self.seq, self.kind = sums, seq, kind

    def add(self, expert: int, sample: Tensor, values: Tensor) -> None:
        """Take in an expert's values, (n, channels), and the sequence of each."""
        for total, part in zip(self.sums, (values.abs(), values.square(), values), strict=True):
            total[:, expert].index_add_(0, sample, part)

    def reduced(self) -> Tensor:
        """As `reduce_sequence` over all tokens of a sequence: (batch, experts * channels)."""
        plain, squares, values = self.sums.flatten(2)
        match self.kind:
            case "mean":
                found: Tensor = plain / self.seq
            case "l2":
                found = squares.sqrt()
            case _:
                found = squares / self.seq - (values / self.seq).square()
        return found


def describe_tokens(tokens: Mapping[int, Sequence[int]]) -> list[str]:
    """What is worth knowing of the tokens that each expert was sent, by layer; nothing of a dense model."""
    if not tokens:
        return []
    counts = [(count, layer, expert) for layer, row in tokens.items() for expert, count in enumerate(row)]
    mean, (fewest, layer, expert) = sum(count for count, _, _ in counts) / len(counts), min(counts)
    lines = [f"Experts saw {mean:,.0f} tokens each on average, expert {expert} of layer {layer} only {fewest:,}."]
    unseen = {layer: [expert for expert, count in enumerate(row) if not count] for layer, row in tokens.items()}
    named = [f"{', '.join(map(str, experts))} of layer {layer}" for layer, experts in unseen.items() if experts]
    if named:
        lines.append(
            f"No token reached experts {'; '.join(named)}: their scores are 0, and nothing ranks their neurons; more "
            "--samples may show what they are for."
        )
    return lines
