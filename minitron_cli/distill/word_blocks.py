"""The head's loss in blocks of words, for vocabularies so large that a chunk of logits holds too few tokens.

The first sweep finds every softmax's normaliser by an online log-sum-exp; the second makes each block's logits again
and turns them into their gradient. That is one more product per model than a chunk of whole rows takes, for memory that
no vocabulary changes. Forward KL and cross-entropy need no third sweep: their slopes sum to -1, whatever the words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_cli.config.objective import Objective
from minitron_cli.distill.losses import forward_kl
from minitron_cli.models.chunks import parts
from minitron_cli.models.head import Head

TERMS = {"kl", "ce"}
"""Losses that two sweeps suffice for."""


class Blocks:
    """Logits of some tokens, (tokens, hidden) through a head, a block of at most `width` words at a time."""

    def __init__(self, hidden: Tensor, head: Head, width: int) -> None:
        self.hidden, self.head = hidden, head
        self._memory = head.buffer(len(hidden), width).flatten()

    def logits(self, words: slice, hidden: Tensor | None = None) -> Tensor:
        """(tokens, words); gradients flow to `hidden`, where the caller gives its own."""
        hidden = self.hidden if hidden is None else hidden
        width = words.stop - words.start
        return self.head.into(self._memory[: len(hidden) * width].view(len(hidden), width), hidden, words)


def loss_in_word_blocks(
    student: Blocks,
    teacher: Blocks | None,
    objective: Objective,
    next_tokens: Tensor | None,
    *,
    width: int,
    temperature: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of each term, (terms,) fp64, and scale * gradient of their weighted sum at `student.hidden`."""
    vocab = student.head.vocab
    common = min(vocab, teacher.head.vocab) if teacher else 0
    # A block lies on one side of the end of the words that both models know.
    shared = list(parts(common, width))
    blocks = [*shared, *(slice(common + rest.start, common + rest.stop) for rest in parts(vocab - common, width))]
    plain = _normaliser(student, blocks, 1.0)
    softened = plain if temperature == 1 and common == vocab else _normaliser(student, shared, temperature)
    theirs = _normaliser(teacher, shared, temperature) if teacher else None
    sums = torch.zeros(len(objective.terms), dtype=torch.float64, device=plain.device)
    total = torch.zeros_like(student.hidden)
    for words in blocks:
        leaf = student.hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = student.logits(words, leaf)
        gradient = torch.zeros_like(logits.detach())
        for number, term in enumerate(objective.terms):
            if term.name == "ce":
                assert next_tokens is not None
                value, part = _cross_entropy(logits.detach() - plain[:, None], next_tokens, words)
            elif words.stop <= common:
                assert teacher is not None and theirs is not None
                value, part = _forward_kl(
                    logits.detach() / temperature - softened[:, None],
                    _no_grad_logits(teacher, words) / temperature - theirs[:, None],
                )
                part *= temperature  # 1 / T of the softmax, T^2 of the softened term
            else:
                continue
            sums[number] += value.double().sum()
            gradient.add_(part, alpha=term.weight * scale)
        logits.backward(gradient)  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        total += leaf.grad
    return sums, total


@torch.no_grad()
def _no_grad_logits(model: Blocks, words: slice) -> Tensor:
    return model.logits(words)


def _normaliser(model: Blocks, blocks: list[slice], temperature: float) -> Tensor:
    """Log of the sum of exp(logits / T) over all blocks, (tokens,)."""
    total = torch.full((len(model.hidden),), -torch.inf, device=model.hidden.device)
    for words in blocks:
        total = torch.logaddexp(total, (_no_grad_logits(model, words) / temperature).logsumexp(-1))
    return total


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """A block's share of the value, and its gradient of logits: the slopes of all blocks sum to -1."""
    value, slope = forward_kl(log_q, log_p)
    return value, slope.add_(log_q.exp())


def _cross_entropy(log_q: Tensor, targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    inside = (targets >= words.start) & (targets < words.stop)
    index = (targets - words.start).where(inside, 0)[:, None]
    hit = inside[:, None].to(log_q.dtype)
    value = -(log_q.gather(-1, index) * hit)[:, 0]
    return value, log_q.exp().scatter_add_(-1, index, -hit)
