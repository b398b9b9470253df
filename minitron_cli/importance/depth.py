"""Depth scores: block importance in the same pass as the width scores, and the loss without each layer."""

from __future__ import annotations

import torch

from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.models.taps import PlacedTap, first_tensor


def block_importance(entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
    """1 - cosine(layer input, layer output), mean over tokens (ShortGPT's BI): two (batch, seq, hidden) to (batch,)."""
    cosine = torch.nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1)
    return (1.0 - cosine).mean(dim=1)


class DepthScores:
    """Running mean over samples of each layer's block importance."""

    def __init__(self, layers: int) -> None:
        self.statistic = [SampleStatistic(1, "mean") for _ in range(layers)]

    def heard(self, placed: PlacedTap, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Take in one layer's input and output."""
        assert placed.layer is not None
        self.statistic[placed.layer].add(block_importance(entering, leaving)[:, None])

    def attach(self, taps: list[PlacedTap]) -> list[torch.utils.hooks.RemovableHandle]:
        """Listen to both sides of every decoder layer; the caller removes the handles."""

        def hook(placed: PlacedTap):  # type: ignore[no-untyped-def]
            def forward(module, args, kwargs, output):  # type: ignore[no-untyped-def]
                self.heard(placed, args[0] if args else kwargs["hidden_states"], first_tensor(output))

            return forward

        return [placed.module.register_forward_hook(hook(placed), with_kwargs=True) for placed in taps]

    def scores(self) -> torch.Tensor:
        """Block importance of each layer, (layers,) fp64."""
        return torch.cat([statistic.value() for statistic in self.statistic])
