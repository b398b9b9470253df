"""Successive halving: who trains how long, and what that costs, before anything is loaded.

The rungs of T steps end at T / 2^(R-1), ..., T / 2, T; after each the better half goes on (Jamieson and Talwalkar,
arXiv 1502.07943). All candidates follow one learning rate schedule over T steps: a loss is only compared with others
at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_cli.errors import ConfigError
from minitron_cli.runtime.progress import quantity


def rung_ends(steps: int, rungs: int) -> list[int]:
    """Steps after which candidates are compared, rounded down, rising; the last is `steps`.

    Raises:
        ConfigError: the first rung would be less than a step.
    """
    if steps >> (rungs - 1) < 1:
        raise ConfigError(
            f"--rungs {rungs} halve {steps} training steps to less than one; give {1 << (rungs - 1)} steps or more, "
            f"or --rungs {steps.bit_length()}."
        )
    return [steps >> (rungs - 1 - rung) for rung in range(rungs)]


def better_half(count: int) -> int:
    """How many of so many go on."""
    return (count + 1) // 2


@dataclass(frozen=True)
class Schedule:
    """`entrants`: how many of each size enter the first rung; `ends`: steps at which rungs end."""

    entrants: tuple[int, ...]
    ends: tuple[int, ...]
    tokens_per_step: int

    @classmethod
    def of(cls, entrants: Sequence[int], steps: int, rungs: int, tokens_per_step: int) -> Schedule:
        """Plan the rungs.

        Raises:
            ConfigError: there are more rungs than the steps can be halved for.
        """
        return cls(tuple(entrants), tuple(rung_ends(steps, rungs)), tokens_per_step)

    @property
    def alive(self) -> list[int]:
        """Candidates in training in each rung."""
        counts, found = list(self.entrants), []
        for _ in self.ends:
            found.append(sum(counts))
            counts = [better_half(count) for count in counts]
        return found

    @property
    def lengths(self) -> list[int]:
        """Steps of each rung."""
        return [end - start for start, end in zip((0, *self.ends), self.ends, strict=False)]

    @property
    def student_tokens(self) -> int:
        """Tokens that all students together are trained on."""
        return self.tokens_per_step * sum(n * steps for n, steps in zip(self.alive, self.lengths, strict=True))

    def teacher_tokens(self, groups: Sequence[int]) -> int:
        """Tokens that pass the teacher, where the candidates of each rung train in so many groups."""
        return self.tokens_per_step * sum(n * steps for n, steps in zip(groups, self.lengths, strict=True))

    def describe(self, measured: int, groups: Sequence[int], taught: str) -> str:
        """The plan as lines of text; `groups` of each rung, `taught` is how the teacher takes part."""
        rungs = ", ".join(f"{count} to step {end}" for count, end in zip(self.alive, self.ends, strict=True))
        teacher = self.teacher_tokens(groups)
        passed = {
            "live": f"the teacher reads {quantity(teacher)} once for all of a group",
            "cached": "the teacher's answers come from its cache",
            "none": "no teacher is needed",
        }[taught]
        most = max(groups)
        together = "" if most == 1 else f" Memory holds only part of them: up to {most} groups, one after another."
        return (
            f"Candidates: {measured} measured zero-shot, {sum(self.entrants)} distilled in {len(self.ends)} rungs "
            f"({rungs}).\nTokens: students are trained on {quantity(self.student_tokens)}, {passed}.{together}"
        )
