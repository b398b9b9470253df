"""How good one sample is, how far the policy went for it, and what best-of-N sampling would have given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from minitron_cli.align.bond import expected_best, kl_best_of_n
from minitron_cli.align.lessons import Writer
from minitron_cli.align.policy import Cast
from minitron_cli.align.prompts import Prompt
from minitron_cli.align.rewards import require_signal, tie_rate

REFERENCE, POLICY = 2, 3
"""Draws of measurements; lessons have 0 and 1."""
NORMAL = 1.96
"""Standard errors on either side of a mean that make an interval of 95 %."""


@dataclass(frozen=True)
class Measurement:
    """One sample of the policy at a step: mean reward, KL to the policy as it was in nats per sequence, both with half
    the width of their 95 % interval; `win_rate` against single samples of the latter, ties half.
    """

    step: int
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    win_rate: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class BestOf:
    """Best-of-n sampling of the policy as it was: its reward, the bound of its KL, and what the aligned policy's one
    sample gives beyond it, prompt by prompt; errors are half the width of 95 % intervals.
    """

    n: int
    reward: float
    reward_error: float
    kl: float
    difference: float
    difference_error: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (prompts, samples) and half its 95 % interval; samples of one prompt count as one observation."""
    means = values.mean(-1) if values.shape[0] > 1 else values[0]
    error = NORMAL * float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(means.mean()), error


class Yardstick:
    """The same prompts and the same random numbers at every measurement, so that differences are the policy's.

    Args:
        samples: responses per measurement, spread over as many of the prompts as leave `n` for each.
    """

    def __init__(self, prompts: Sequence[Prompt], cast: Cast, writer: Writer, samples: int, n: int, seed: int) -> None:
        self.prompts = list(prompts[: max(1, samples // n)])
        self.count = samples // len(self.prompts)
        self.cast, self.writer, self.seed = cast, writer, seed
        self.before: Tensor | None = None
        """Rewards of the policy as it was, (prompts, count)."""
        self.after: Tensor | None = None
        """Rewards at the last measurement."""

    def reference(self) -> Tensor:
        """Rewards of the policy as it was; measured once.

        Raises:
            RewardFailed: the reward fails, or tells no response from another.
        """
        if self.before is None:
            self.before = self._rewards(self._write(self.cast.reference, REFERENCE))
            require_signal(self.writer.reward.name, self.before)
        return self.before

    def measure(self, step: int) -> Measurement:
        """The policy now.

        Raises:
            RewardFailed: the reward fails.
        """
        before, cast = self.reference(), self.cast
        responses = self._write(cast.learner.model, POLICY)
        self.after = rewards = self._rewards(responses)
        ratio = cast.likelihoods(cast.learner.model, responses) - cast.likelihoods(cast.reference, responses)
        wins = (rewards[:, :, None] > before[:, None]).double() + 0.5 * (
            rewards[:, :, None] == before[:, None]
        ).double()
        kl, kl_error = mean_and_error(ratio.double().view(len(self.prompts), -1))
        return Measurement(step, *mean_and_error(rewards), kl, kl_error, float(wins.mean()))

    def best_of(self, sizes: Sequence[int]) -> list[BestOf]:
        """Best-of-n sampling beside the last measurement."""
        before, after = self.reference(), self.after
        assert after is not None, "measure first"
        found = []
        for n in sizes:
            best = expected_best(before, n)[:, None]
            gain = after.mean(-1, keepdim=True) - best
            if len(best) == 1:  # one prompt: no interval over prompts
                found.append(BestOf(n, float(best), 0.0, kl_best_of_n(n), float(gain), 0.0))
            else:
                found.append(BestOf(n, *mean_and_error(best), kl_best_of_n(n), *mean_and_error(gain)))
        return found

    def ties(self) -> float:
        """The share of pairs of one prompt's responses that are worth the same."""
        return tie_rate(self.reference())

    def examples(self, count: int) -> list[dict[str, Any]]:
        """The first response to each of some prompts, before and after."""
        some = self.prompts[:count]
        rows: list[dict[str, Any]] = [{"prompt": prompt.text} for prompt in some]
        casts = {"before": (self.cast.reference, REFERENCE), "after": (self.cast.learner.model, POLICY)}
        for name, (model, draw) in casts.items():
            texts = self.writer.texts(self.writer.write(model, some, 1, self.seed, 0, draw))
            for row, text, reward in zip(rows, texts, self.writer.rewards(some, texts)[:, 0].tolist(), strict=True):
                row |= {name: text, f"reward_{name}": reward}
        return rows

    def _write(self, model: Any, draw: int) -> Any:
        return self.writer.write(model, self.prompts, self.count, self.seed, 0, draw)

    def _rewards(self, responses: Any) -> Tensor:
        return self.writer.rewards(self.prompts, self.writer.texts(responses))
