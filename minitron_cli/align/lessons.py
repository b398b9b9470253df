"""One step's lesson: samples, their rewards, and the weights that each method gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron_cli.align import weights
from minitron_cli.align.bond import jbond_reward
from minitron_cli.align.policy import Cast
from minitron_cli.align.prompts import Prompt
from minitron_cli.align.rewards import Checked, tie_rate
from minitron_cli.align.sampling import Responses, Sampler
from minitron_cli.config.align import AlignConfig
from minitron_cli.errors import ConfigError
from minitron_cli.runtime.group import Group

POLICY, ANCHOR = 0, 1
"""Draws of one step."""


@dataclass(frozen=True)
class Lesson:
    """Responses with the weights of their log-likelihoods, (responses,); figures of the step, for the log."""

    responses: Responses
    weights: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class Writer:
    """Draws responses as token ids and gives them as text."""

    sampler: Sampler
    tokenizer: Any
    stop: str | None
    reward: Checked

    def write(
        self, model: Any, prompts: Sequence[Prompt], count: int, *seed: int, part: slice = slice(None)
    ) -> Responses:
        """`count` responses to each prompt, or to a part of them, in rows."""
        return self.sampler.sample(model, [prompt.ids for prompt in prompts], count, *seed, part=part)

    def texts(self, responses: Responses) -> list[str]:
        """What a reader sees: no special tokens, nothing from the stop text on."""
        found = [self.tokenizer.decode(row, skip_special_tokens=True) for row in responses.tokens()]
        return [text.split(self.stop)[0] for text in found] if self.stop else found

    def rewards(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """(prompts, responses per prompt) in float64.

        Raises:
            RewardFailed: the reward cannot judge them.
        """
        count = len(texts) // len(prompts)
        return self.reward([prompt for prompt in prompts for _ in range(count)], texts).view(-1, count)


class Teaching:
    """The methods: what each samples and how it weighs it.

    Several processes share the prompts of a step: each writes and reads its own responses, and weighs them beside those
    of all others.
    """

    def __init__(self, config: AlignConfig, cast: Cast, writer: Writer, group: Group | None = None) -> None:
        self.config, self.cast, self.writer, self.group = config, cast, writer, group or Group()

    def lesson(self, prompts: Sequence[Prompt], step: int) -> Lesson:
        """The lesson of a step: a function of the models, the prompts and (seed, step).

        Of several processes each gets the responses to its part of the prompts, and figures of all.

        Raises:
            RewardFailed: the reward cannot judge a response.
        """
        config, cast, part, joined = self.config, self.cast, self.group.part, self.group.joined
        model, count = cast.learner.model, config.own_samples
        own = self.writer.write(model, prompts, count, config.seed, step, POLICY, part=part)
        mine = self.writer.rewards(prompts[part], self.writer.texts(own))
        likelihood = cast.likelihoods(model, own)
        rewards, from_reference = (
            joined(mine),
            joined((likelihood - cast.likelihoods(cast.reference, own)).view_as(mine)),
        )
        from_anchor = from_reference
        if cast.anchor is not cast.reference:
            from_anchor = joined((likelihood - cast.likelihoods(cast.anchor, own)).view_as(mine))
        figures = {
            "reward": rewards.mean().item(),
            "kl": from_reference.mean().item(),
            "kl_anchor": from_anchor.mean().item(),
            "response_tokens": joined(own.lengths.view_as(mine)).double().mean().item(),
        }
        if config.method == "reinforce":
            weight = weights.reinforce(rewards.to(from_reference), from_reference, config.kl_weight)
            return Lesson(own, weight[part].flatten() / config.own_samples, figures | {"ties": tie_rate(rewards)})
        return self._with_anchor(prompts, step, own, rewards, from_anchor, figures)

    def _with_anchor(
        self, prompts: Sequence[Prompt], step: int, own: Responses, rewards: Tensor, ratio: Tensor,
        figures: dict[str, float],
    ) -> Lesson:  # fmt: skip
        """BOND, J-BOND and SFT: the anchor's samples rank the policy's, and the best of them is imitated."""
        config, count, part = self.config, self.config.anchor_samples, self.group.part
        others = self.writer.write(self.cast.anchor, prompts, count, config.seed, step, ANCHOR, part=part)
        mine = self.writer.rewards(prompts[part], self.writer.texts(others))
        compared = self.group.joined(mine)
        figures["ties"] = tie_rate(compared)
        if config.method == "jbond":
            figures["penalised"] = float((jbond_reward(rewards, compared) < 0).double().mean())
            backward = weights.jbond_backward(rewards, compared, ratio, config.beta, config.gamma)
        elif config.backward > 0:
            backward = weights.bond_backward(rewards, compared[:, : config.k], ratio, config.n, config.beta)
        else:
            backward = torch.zeros_like(ratio)
        taken = 2 if config.method == "jbond" else config.n
        rows = torch.arange(len(mine)) * count + weights.best(mine[:, :taken]).cpu()
        forward = torch.full((len(mine),), 1 - config.backward, device=backward.device, dtype=backward.dtype)
        chosen = others[rows.to(own.ids.device)]
        weight = torch.cat([backward[part].flatten() / config.own_samples, forward])
        return Lesson(Responses.join([own, chosen]), weight, figures)


def stop_tokens(tokenizer: Any, model: Any, stop: str | None, words: int) -> Tensor:
    """Which of the words end a response: end tokens of the model and the tokenizer, and all that contain the stop text.

    Raises:
        ConfigError: no token contains it.
    """
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        found = getattr(source, "eos_token_id", None)
        ends |= set(found) if isinstance(found, (list, tuple)) else {found} if found is not None else set()
    if stop is not None:
        with_text = {word for word in range(min(words, len(tokenizer))) if stop in tokenizer.decode([word])}
        if not with_text:
            raise ConfigError(f"--stop {stop!r}: no single token contains it; use a text that is part of one.")
        ends |= with_text
    stops = torch.zeros(words, dtype=torch.bool)
    stops[[word for word in ends if 0 <= word < words]] = True
    return stops
