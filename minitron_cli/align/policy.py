"""The policy and those it is compared with, and one weighted step on log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron_cli.align.sampling import Responses, log_probs
from minitron_cli.distill.learner import Learner


@dataclass(frozen=True)
class Update:
    """What one optimizer step reports. `loss`: minus the weighted log-likelihood per prompt."""

    loss: float
    gradient_norm: float
    learning_rate: float


class PolicyLearner(Learner):
    """Raises or lowers the log-likelihood of responses."""

    def update(
        self, responses: Responses, weights: Tensor, prompts: int, step: int, *, words: int, size: int
    ) -> Update:
        """One optimizer step down -sum(weight * log p(response)) / prompts.

        Args:
            weights: (responses,); those of weight 0 are not read.
            size: responses per forward and backward pass.

        Raises:
            NotFinite: the loss or the gradient is not finite.
        """
        self.begin(step)
        total = 0.0
        for rows in torch.split(weights.nonzero().flatten(), size):
            with self.computing():
                likelihood = log_probs(self.model, responses[rows], words)
                loss = -(likelihood * weights[rows].to(likelihood)).sum() / prompts
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        (total,) = self.group.sum_of(total)
        norm, rate = self.finish(total, step)
        return Update(total, norm, rate)


@dataclass(frozen=True)
class Cast:
    """Who speaks: `learner` holds the policy, `reference` is the policy as it was, `anchor` whose best-of-N is learned
    (the reference itself where nothing else is).
    """

    learner: PolicyLearner
    reference: Any
    anchor: Any
    words: int
    size: int

    def likelihoods(self, model: Any, responses: Responses) -> Tensor:
        """log p(response | prompt), (responses,), without gradients, in passes of `size`."""
        with torch.no_grad(), self.learner.computing():
            rows = torch.arange(len(responses), device=responses.ids.device)
            return torch.cat([log_probs(model, responses[some], self.words) for some in torch.split(rows, self.size)])

    def copy_policy(self) -> None:
        """The anchor becomes the policy."""
        self.follow(1.0)

    def follow(self, eta: float) -> None:
        """anchor <- (1 - eta) anchor + eta policy, in fp32."""
        with torch.no_grad():
            for mine, theirs in self._pairs():
                mine.lerp_(theirs.to(mine), eta) if eta < 1 else mine.copy_(theirs)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.anchor.parameters(), self.learner.model.parameters(), strict=True)

    def anchor_tensors(self) -> dict[str, Tensor]:
        """The anchor's weights by name, for a checkpoint."""
        return {f"anchor.{name}": tensor for name, tensor in self.anchor.named_parameters()}

    def restore_anchor(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `anchor_tensors` gave."""
        with torch.no_grad():
            for name, tensor in self.anchor.named_parameters():
                tensor.copy_(tensors[f"anchor.{name}"])
