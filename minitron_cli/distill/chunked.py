"""Losses from hidden states through the output heads, a chunk of tokens at a time.

Logits exist for one chunk only; each chunk's gradient flows back to the student's hidden states and head before the
next begins, so memory does not grow with (tokens x vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minitron_cli.distill.losses import cross_entropy, forward_kl
from minitron_cli.models.head import Head

CHUNK_BYTES = 64 << 20
"""Logits of one chunk, in fp32."""

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(student logits (chunk, vocab), which tokens) to per-token losses (chunk,)."""


def chunks(tokens: int, vocab: int) -> Iterator[slice]:
    """Token ranges whose fp32 logits take at most CHUNK_BYTES."""
    length = max(1, CHUNK_BYTES // (4 * vocab))
    for start in range(0, tokens, length):
        yield slice(start, min(start + length, tokens))


def backward_in_chunks(hidden: torch.Tensor, head: Head, loss_of: ChunkLoss, scale: float) -> float:
    """Sum `loss_of(student logits, chunk)` over all chunks and send scale * gradient into the student.

    Args:
        hidden: final hidden states of target positions, (tokens, hidden), attached to the student's graph.
        loss_of: per-token losses of a chunk, (chunk tokens,).
        scale: factor on the gradient (1 / tokens in the optimizer step).

    Returns the unscaled sum over tokens.
    """
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for chunk in chunks(len(leaf), head.vocab):
        loss = loss_of(head(leaf[chunk]), chunk).sum()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double()
    assert leaf.grad is not None
    hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return float(total)


def kl_loss(teacher_hidden: torch.Tensor, teacher_head: Head, temperature: float) -> ChunkLoss:
    """A chunk loss: forward KL to the teacher's logits, made from its hidden states when the chunk comes."""

    def loss(student_logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden[chunk])
        return forward_kl(student_logits, teacher_logits, temperature)

    return loss


def ce_loss(targets: torch.Tensor) -> ChunkLoss:
    """A chunk loss: cross-entropy to the next tokens, (tokens,) ids."""

    def loss(student_logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        return cross_entropy(student_logits, targets[chunk])

    return loss
