"""Rewards: what a response to a prompt is worth. Larger is better; only differences within a prompt matter."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from minitron_cli.align.prompts import Prompt
from minitron_cli.errors import ConfigError, InputError


class Reward(Protocol):
    """Rewards of responses, one for each pair of a prompt and a response."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]:
        """As many numbers as responses."""


class RewardFailed(InputError):
    """The reward raised, or gave something else than finite numbers; what was trained so far is kept."""


@dataclass(frozen=True)
class Checked:
    """A reward whose every answer is checked. `name`: as the user wrote it."""

    name: str
    reward: Reward

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(responses,) in float64.

        Raises:
            RewardFailed: an error, another number of values, or one that is not finite.
        """
        try:
            values = [float(value) for value in self.reward(prompts, responses)]
        except RewardFailed:
            raise
        except Exception as error:  # a function of the user's, or a model's own
            told = str(error).strip().splitlines()
            words = f" ({told[0].rstrip('.')})" if told else ""
            raise RewardFailed(
                f"The reward {self.name} raised {type(error).__name__}{words}; correct it and run the command again."
            ) from error
        if len(values) != len(responses):
            raise RewardFailed(
                f"The reward {self.name} gave {len(values)} numbers for {len(responses)} responses; it should give one "
                "for each."
            )
        for value, response in zip(values, responses, strict=True):
            if not math.isfinite(value):
                raise RewardFailed(
                    f"The reward {self.name} is {value} for the response {shortened(response)}; it should be a finite "
                    "number for every text."
                )
        return torch.tensor(values, dtype=torch.float64)


def shortened(text: str) -> str:
    """The start of a text, in quotes."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def require_signal(name: str, rewards: torch.Tensor) -> None:
    """Refuse rewards that tell no response of any prompt from another.

    Args:
        rewards: (prompts, samples).

    Raises:
        RewardFailed: all samples of each prompt are worth the same.
    """
    if tie_rate(rewards) == 1:
        value = f"{rewards[0, 0].item():g}" if (rewards == rewards[0, 0]).all() else "the same for each prompt"
        raise RewardFailed(
            f"The reward {name} is {value} in all {rewards.numel()} responses, so no response is better than another "
            "and there is nothing to learn; use a graded reward, or prompts on which the policy sometimes succeeds."
        )


def tie_rate(rewards: torch.Tensor) -> float:
    """The share of pairs of a prompt's (prompts, samples) that have equal rewards."""
    count = rewards.shape[-1]
    if count < 2:
        return 0.0
    equal = (rewards[..., :, None] == rewards[..., None, :]).sum((-2, -1)) - count
    return float((equal / (count * (count - 1))).mean())


@dataclass(frozen=True)
class Length:
    """Minus the distance from a number of characters, relative to it."""

    target: int

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """0 at the target, -1 for an empty response."""
        return [-abs(len(response) - self.target) / self.target for response in responses]


@dataclass(frozen=True)
class Words:
    """How many of some words a response has, and the share of its characters that are theirs."""

    words: tuple[str, ...]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Between 0 and one more than there are words."""
        return [self._of(response) for response in responses]

    def _of(self, text: str) -> float:
        found = [word for word in self.words if word in text]
        covered = sum(text.count(word) * len(word) for word in found)
        return len(found) + min(1.0, covered / max(len(text), 1))


def function_reward(spec: str) -> Reward:
    """A function `f(prompts, responses)` of a module, looked up from the current directory too; both are lists of text.

    Raises:
        ConfigError: no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"--reward {spec}: {module_name} cannot be imported ({type(error).__name__}: {error}); it should be a "
            "module on the path or a file in the current directory."
        ) from error
    function: Callable[[list[str], list[str]], Sequence[float]] | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--reward {spec}: {module_name} has no function {name}.")

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]:
        return function([prompt.text for prompt in prompts], list(responses))

    return reward
