"""Estimate what a training step holds, before loading anything, and choose how many sequences pass at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minitron_cli.config.distill import TrainingConfig
from minitron_cli.distill.fused import logits_bytes
from minitron_cli.distill.intermediate import Matching
from minitron_cli.distill.spread import Spread
from minitron_cli.errors import ConfigError
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
    spread: Spread = field(default_factory=Spread)

    def memory(self, sequences: int) -> dict[str, int]:
        """Bytes held by one process at the peak of a step with so many sequences per forward pass, by part."""
        student, teacher, size, spread = self.student, self.teacher, self.dtype.itemsize, self.spread
        tokens = sequences * self.seq_len
        vocab = max(student["vocab"], teacher["vocab"] if teacher else 0)
        # What autocast rounds for the products, kept until the step ends.
        rounded = student.params_non_embedding + student["hidden"] * student["vocab"] if size < 4 else 0
        passing = tokens * kept_per_token(teacher) * size if teacher else 0
        kept = max(tokens * self._kept(student) * size, passing)
        away = spread.offload and self.device.type != "cpu"
        mine = 0 if away else -(-student.params // spread.student)
        return {
            "weights": 4 * mine,
            "gradients": 4 * mine,
            "optimizer": 8 * mine,
            "rounded weights": size * rounded if spread.processes == 1 else 0,
            "teacher": -(-size * teacher.params // spread.teacher) if teacher else 0,
            "gathered": self._gathered(kept) if spread.processes > 1 else 0,
            "activations": kept,
            "loss chunk": logits_bytes(tokens, vocab, self.device),
            "states": self.states.memory(sequences, self.seq_len, self.device) if self.states else 0,
        }

    def _gathered(self, kept: int) -> int:
        """Bytes of whole weights and gradients beside a process's parts, at the worst of three moments: in the last
        layer (it, the next one, its gradients and their fp32 copy), while logits are made (both heads, the gradient
        and its sum), and at the end of the backward pass, when activations (`kept`) are gone, in the embeddings.
        """
        student, teacher, size = self.student, self.teacher, self.dtype.itemsize
        layers, words = student["layers"], student["vocab"] * student["hidden"]
        layer = student.params_non_embedding // layers
        held = size * layer * layers if self.spread.keep_gathered else 0
        other = 0
        if teacher is not None and self.spread.teacher > 1:
            other = size * max(
                2 * teacher.params_non_embedding // teacher["layers"], teacher["vocab"] * teacher["hidden"]
            )
        in_layer, in_head = max(held, 2 * size * layer) + (size + 4) * layer, held + (size + 8) * words + other
        return max(in_layer, in_head, 8 * words - kept)

    def _kept(self, student: Shape) -> int:
        """Elements per token that autograd keeps: of all layers, or of one and every layer's input."""
        layers = student["layers"]
        if self.config.checkpoint_activations:
            return layers * student["hidden"] + kept_per_token(student)
        return layers * kept_per_token(student)

    def fitting(self, free: int) -> int | None:
        """The most sequences per forward pass that so many bytes hold, at most a process's share of a step."""
        share = self.spread.share(self.config.batch_size)
        return next((n for n in divisors(share) if sum(self.memory(n).values()) <= SHARE * free), None)

    def micro_batch(self, before: int | None = None) -> int:
        """Sequences per forward pass: as asked for, else `before` (a resumed run's), else the most that fits.

        Raises:
            ResourceError: not even the fewest fit; with the options that would help.
        """
        free, batch = available_bytes(self.device), self.spread.share(self.config.batch_size)
        chosen = self.config.micro_batch
        if chosen is not None and batch % chosen:
            raise ConfigError(
                f"--micro-batch {chosen}: each of {self.spread.processes} processes has {batch} sequences of a step, "
                "which it does not divide."
            )
        if chosen is None and before is not None:
            if sum(self.memory(before).values()) <= free:
                return before
            say("There is less memory than before: the result will equal an undisturbed run's up to rounding only.")
        if chosen is None:
            chosen = self.fitting(free) or 1
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


def save_micro_batch(partial: Path, sequences: int, processes: int = 1) -> None:
    """Note the choice: free memory differs from start to start, and sums of other parts round differently."""
    write_json(partial / MICRO_BATCH, {"micro_batch": sequences, "processes": processes})


def saved_micro_batch(partial: Path, processes: int = 1) -> int | None:
    """What `save_micro_batch` noted, if as many processes run now."""
    try:
        noted = json.loads((partial / MICRO_BATCH).read_text("utf-8"))
        return int(noted["micro_batch"]) if noted.get("processes", 1) == processes else None
    except (OSError, ValueError):
        return None
