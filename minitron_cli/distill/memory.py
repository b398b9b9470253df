"""Estimate what a training step holds, before loading anything."""

from __future__ import annotations

import torch

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.fused import logits_bytes
from minitron_cli.runtime.memory import require_memory
from minitron_cli.shape import Shape


def training_memory(
    student: Shape, teacher: Shape | None, config: DistillConfig, seq_len: int, device: torch.device, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes held at the peak of a step, by part.

    Activations count what autograd keeps per token and layer of a stock decoder block: about 16 vectors of hidden size
    (norms, residuals, projections, attention) and 4 of the MLP width.
    """
    tokens = (config.micro_batch or config.batch_size) * seq_len
    width = 16 * student["hidden"] + 4 * student.sizes.get("ffn", 0)
    vocab = max(student["vocab"], teacher["vocab"] if teacher else 0)
    return {
        "student weights": 4 * student.params,
        "gradients": 4 * student.params,
        "optimizer": 8 * student.params,
        "teacher": dtype.itemsize * teacher.params if teacher else 0,
        "activations": tokens * student["layers"] * width * dtype.itemsize,
        "logits chunk": logits_bytes(tokens, vocab, device),
        "rounded head": dtype.itemsize * student["hidden"] * student["vocab"] if dtype.itemsize < 4 else 0,
    }


def require_training_memory(
    student: Shape, teacher: Shape | None, config: DistillConfig, seq_len: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse what cannot fit.

    Raises:
        ResourceError: with the options that would help.
    """
    parts = training_memory(student, teacher, config, seq_len, device, dtype)
    smaller = "a smaller --micro-batch (the batch stays the same)"
    advice = f"try {smaller}, a smaller student or teacher, or a device with more memory"
    require_memory(parts, device, advice)
