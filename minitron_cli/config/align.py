"""Options of `minitron align`."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from minitron_cli.config.base import argument, option, required
from minitron_cli.config.distill import OptimizerConfig
from minitron_cli.errors import ConfigError

GRADED = {
    "length": "length:N, N characters",
    "words": "words:A,B,C, words to use",
    "likelihood": "likelihood:CKPT, a model's opinion",
}
"""Rewards that need no model of rewards."""


@dataclass(frozen=True)
class RewardSpec:
    """A reward as the user wrote it. `kind`: length, words, likelihood, function or model; `value`: what follows."""

    kind: str
    value: str


def parse_reward(spec: str) -> RewardSpec:
    """Read `length:40`, `words:a,b`, `likelihood:CKPT`, `module:function`, or the reference of a reward model.

    Raises:
        ConfigError: none of them.
    """
    name, colon, value = spec.partition(":")
    if not spec.strip() or spec.startswith(("/", ".", "~")) or not colon or name == "builtin":
        if not spec.strip():
            raise ConfigError("name a reward: a reward model, module:function, length:N, words:A,B or likelihood:CKPT.")
        return RewardSpec("model", spec)
    if name in GRADED:
        _check_graded(name, value)
        return RewardSpec(name, value)
    if all(part.isidentifier() for part in name.split(".")) and value.isidentifier():
        return RewardSpec("function", spec)
    near = difflib.get_close_matches(name, GRADED, n=1)
    hint = f"did you mean {GRADED[near[0]]}?" if near else f"use {'; '.join(GRADED.values())}; or module:function."
    raise ConfigError(f"'{spec}' is no reward; {hint}")


def _check_graded(name: str, value: str) -> None:
    if name == "length" and not (value.isdecimal() and int(value) > 0):
        raise ConfigError(f"length needs a number of characters, for example length:80 (got '{value}').")
    if name == "words" and not split_words(value):
        raise ConfigError(f"words needs words, for example words:self,return (got '{value}').")
    if name == "likelihood" and not value:
        raise ConfigError("likelihood needs a checkpoint, for example likelihood:builtin:tiny-py.")


def split_words(value: str) -> list[str]:
    """The words of `words:a,b`."""
    return [word.strip() for word in value.split(",") if word.strip()]


@dataclass(frozen=True, kw_only=True)
class AlignConfig(OptimizerConfig):
    """Train a model so that one sample is as good as the best of N (BOND). The same command again resumes."""

    policy: str = argument("Checkpoint to align: directory, Hub id or builtin:tiny-py.", keyed=False)
    reward: str = required(
        "Sequence-classification checkpoint; module:function, called with lists of prompts and responses; length:N; "
        "words:A,B,C; likelihood:CKPT."
    )
    prompts: Path = required(
        "JSONL file with `prompt` (text) or `messages` (chat) in each row; or a prepared data set, whose sequences' "
        "first tokens are continued.", keyed=False,
    )  # fmt: skip
    reward_label: str | None = option(None, "Label of a reward model that has several.")
    method: Literal["bond", "jbond", "reinforce", "sft"] = option(
        "bond", "bond; jbond (two samples of a moving anchor); reinforce with a KL penalty; sft on best-of-N samples."
    )
    teacher: str | None = option(
        None, "Anchor of bond and sft: learn this model's best-of-N, with the same tokenizer. Default: the policy as "
        "it was.", keyed=False,
    )  # fmt: skip
    n: Annotated[int, Ge(2)] = option(8, "N of best-of-N: what bond and sft learn, and what results are compared with.")
    policy_samples: Annotated[int, Ge(1)] | None = option(
        None, "Samples of the policy per prompt and step: less noise, more time. Default: 2 for reinforce, else 1."
    )
    k: Annotated[int, Ge(1)] = option(16, "Anchor samples per prompt that bond estimates quantiles from.")
    beta: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "Weight of the backward KL (policy gradient) in bond and jbond; the forward KL has the rest."
    )
    anchor_every: Annotated[int, Ge(1)] | None = option(
        None, "Steps after which bond's anchor becomes the policy, again and again. Default: the anchor stays."
    )
    eta: Annotated[float, Gt(0), Le(1)] = option(0.02, "Share of the policy that jbond's anchor takes at each step.")
    gamma: Annotated[float, Ge(0)] = option(0.0, "Weight of jbond's extra KL to the anchor; larger is slower.")
    kl_weight: Annotated[float, Ge(0)] = option(0.1, "Weight of reinforce's KL penalty, in rewards per nat.")
    steps: Annotated[int, Ge(1)] = required("Optimizer steps, at most.")
    batch_size: Annotated[int, Ge(2)] = option(32, "Prompts per optimizer step.")
    micro_batch: Annotated[int, Ge(1)] = option(32, "Responses per forward and backward pass.")
    sample_batch: Annotated[int, Ge(1)] = option(256, "Responses generated at once.")
    max_new_tokens: Annotated[int, Ge(1)] = option(64, "Longest response, in tokens.")
    stop: str | None = option(None, r"Text that ends a response, beside the end token; \n is a line end.")
    prompt_tokens: Annotated[int, Ge(1)] = option(32, "First tokens of a prepared data set's sequences to continue.")
    eval_prompts: Path | None = option(
        None, "Prompts to measure on. Default: the validation split; of a file, every tenth prompt, which training "
        "leaves out.", keyed=False,
    )  # fmt: skip
    eval_samples: Annotated[int, Ge(2)] = option(512, "Responses per measurement.")
    eval_every: Annotated[int, Ge(1)] = option(50, "Steps between measurements.")
    kl_budget: Annotated[float, Gt(0)] | None = option(
        None, "Stop when the KL to the policy as it was, in nats per sequence, reaches this."
    )
    patience: Annotated[int, Ge(1)] | None = option(None, "Stop after so many measurements without a better reward.")
    weight_decay: Annotated[float, Ge(0)] = option(0.0, "AdamW weight decay, on matrices only.")
    lr: Annotated[float, Gt(0)] = option(1e-5, "Peak learning rate.")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the prompts' order and of every sample.")

    @property
    def reward_spec(self) -> RewardSpec:
        """What `reward` says."""
        return parse_reward(self.reward)

    @property
    def stop_text(self) -> str | None:
        """What `stop` means, with line ends and tabs as such."""
        return self.stop.replace("\\n", "\n").replace("\\t", "\t") if self.stop is not None else None

    @property
    def own_samples(self) -> int:
        """Samples of the policy per prompt and step; reinforce compares those of one prompt."""
        return self.policy_samples or (2 if self.method == "reinforce" else 1)

    @property
    def anchor_samples(self) -> int:
        """Samples of the anchor per prompt and step; those that give the best of N also give quantiles."""
        if self.method == "bond":
            return max(self.n if self.beta < 1 else 0, self.k if self.beta > 0 else 0)
        return {"sft": self.n, "jbond": 2, "reinforce": 0}[self.method]

    @property
    def backward(self) -> float:
        """Weight of the policy's own samples."""
        return {"sft": 0.0, "reinforce": 1.0}.get(self.method, self.beta)

    @property
    def moving_anchor(self) -> bool:
        """Whether the anchor changes while training."""
        return self.method == "jbond" or self.anchor_every is not None

    def check(self) -> None:
        super().check()
        try:
            parse_reward(self.reward)
        except ConfigError as error:
            raise ConfigError(f"--reward: {error}") from None
        if self.stop == "":
            raise ConfigError("--stop is empty; give the text that ends a response, or leave it out.")
        if self.method != "bond" and self.anchor_every is not None:
            raise ConfigError(f"--anchor-every belongs to --method bond, not {self.method}; leave it out.")
        if self.teacher is not None:
            self._check_teacher()
        if self.method == "reinforce" and self.own_samples < 2:
            raise ConfigError("--method reinforce compares the samples of a prompt; use --policy-samples 2 or more.")
        if self.eval_samples < self.n:
            raise ConfigError(f"--eval-samples {self.eval_samples} is less than --n {self.n}; use more.")

    def _check_teacher(self) -> None:
        if self.method not in ("bond", "sft"):
            raise ConfigError(f"--teacher is an anchor that stays, for --method bond or sft, not {self.method}.")
        if self.anchor_every is not None:
            raise ConfigError("--anchor-every replaces the anchor by the policy, --teacher by a model; leave one out.")

    def best_of(self) -> list[int]:
        """The sizes of best-of-n that results are compared with: powers of two below N, and N."""
        return [2**power for power in range(math.ceil(math.log2(self.n)))] + [self.n]
