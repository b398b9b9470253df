"""Estimate what a training step holds, before loading anything, and choose how many sequences pass at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_cli.config.distill import TrainingConfig
from minitron_cli.distill.fused import logits_bytes
from minitron_cli.distill.intermediate import Matching
from minitron_cli.manifest import write_json
from minitron_cli.runtime.memory import available_bytes, require_memory
from minitron_cli.runtime.progress import say
from minitron_cli.shape import Shape

MICRO_BATCH = "state.micro_batch.json"
SHARE = 0.9
"""Of the free memory, for an automatic choice: an estimate is not exact."""


@dataclass(frozen=True)
class Case:
    """What decides a step's memory and time, beside the sequences of a forward pass."""

    student: Shape
    teacher: Shape | None
    config: TrainingConfig
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    states: Matching | None = None

    def memory(self, sequences: int) -> dict[str, int]:
        """Bytes held at the peak of a step with so many sequences per forward pass, by part."""
        student, teacher, size = self.student, self.teacher, self.dtype.itemsize
        tokens = sequences * self.seq_len
        vocab = max(student["vocab"], teacher["vocab"] if teacher else 0)
        # What autocast rounds for the products, kept until the step ends.
        rounded = student.params_non_embedding + student["hidden"] * student["vocab"] if size < 4 else 0
        passing = tokens * kept_per_token(teacher) * size if teacher else 0
        return {
            "weights": 4 * student.params,
            "gradients": 4 * student.params,
            "optimizer": 8 * student.params,
            "rounded weights": size * rounded,
            "teacher": size * teacher.params if teacher else 0,
            "activations": max(tokens * self._kept(student) * size, passing),
            "loss chunk": logits_bytes(tokens, vocab, self.device),
            "states": self.states.memory(sequences, self.seq_len, self.device) if self.states else 0,
        }

    def _kept(self, student: Shape) -> int:
        """Elements per token that autograd keeps: of all layers, or of one and every layer's input."""
        layers = student["layers"]
        if self.config.checkpoint_activations:
            return layers * student["hidden"] + kept_per_token(student)
        return layers * kept_per_token(student)

    def micro_batch(self, before: int | None = None) -> int:
        """Sequences per forward pass: as asked for, else `before` (a resumed run's), else the most that fits.

        Raises:
            ResourceError: not even the fewest fit; with the options that would help.
        """
        free, batch = available_bytes(self.device), self.config.batch_size
        chosen = self.config.micro_batch
        if chosen is None and before is not None:
            if sum(self.memory(before).values()) <= free:
                return before
            say("There is less memory than before: the result will equal an undisturbed run's up to rounding only.")
        if chosen is None:
            fitting = (n for n in divisors(batch) if sum(self.memory(n).values()) <= SHARE * free)
            chosen = next(fitting, 1)
        smaller = "" if chosen == 1 else "a smaller --micro-batch (the batch stays the same), "
        again = "" if self.config.checkpoint_activations else "--checkpoint-activations, "
        advice = f"try {smaller}{again}a smaller student or teacher, or a device with more memory"
        require_memory(self.memory(chosen), self.device, advice)
        return chosen


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def smaller_part(batch: int, part: int) -> int:
    """The largest divisor of the batch that is at most half of a part (of 2 or more)."""
    return next(n for n in divisors(batch) if 2 * n <= part)


def kept_per_token(shape: Shape) -> int:
    """Elements that a stock decoder block makes for autograd: about 16 vectors of hidden size (norms, residuals,
    projections, attention) and 4 of the MLP width; 4 more of hidden size for each routed expert that a token passes.
    """
    return (16 + 4 * shape.experts_per_token) * shape["hidden"] + 4 * shape.inner


def save_micro_batch(partial: Path, sequences: int) -> None:
    """Note the choice: free memory differs from start to start, and sums of other parts round differently."""
    write_json(partial / MICRO_BATCH, {"micro_batch": sequences})


def saved_micro_batch(partial: Path) -> int | None:
    """What `save_micro_batch` noted."""
    try:
        return int(json.loads((partial / MICRO_BATCH).read_text("utf-8"))["micro_batch"])
    except (OSError, ValueError):
        return None
