"""Losses from hidden states through the output heads, a chunk of tokens at a time.

Logits exist for one chunk only, in two buffers that all chunks share. The student's is overwritten by its own
gradient, which goes on to hidden states and head before the next chunk begins: memory does not grow with
(tokens x vocabulary), and no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import backward
from torch.autograd.graph import get_gradient_edge

from minitron_cli.config.objective import Objective
from minitron_cli.distill.losses import TopK
from minitron_cli.distill.over import gradient_over
from minitron_cli.distill.terms import Targets
from minitron_cli.distill.word_blocks import TERMS, Blocks, loss_in_word_blocks
from minitron_cli.models.chunks import block_tokens, chunk_tokens, parts
from minitron_cli.models.head import Head
from minitron_cli.models.states import States

FEWEST_TOKENS = 64
"""A matrix product of fewer rows runs far below full speed: with a larger vocabulary, words come in blocks instead."""


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch at target positions: final hidden states (targets, hidden), its head, and the
    intermediate states asked for, (targets, channels).
    """

    hidden: Tensor
    head: Head
    states: States = field(default_factory=dict)


@dataclass(frozen=True)
class HeadLoss:
    """Sums over tokens: each term's unweighted value by name, and the weighted `total`; and scale * d total / d hidden,
    (tokens, hidden), to send into the backbone. The head's gradients are already in its `.grad`.
    """

    terms: dict[str, float]
    total: float
    gradient: Tensor


def logits_bytes(tokens: int, vocab: int, device: torch.device) -> int:
    """An upper bound of what `head_loss` holds beside its inputs: two buffers, four more of what a capped head's own
    graph makes (a plain head none), and temporaries, of a chunk where words come in blocks, else of a block of rows.
    """
    chunk = chunk_tokens(tokens, vocab, device)
    return 4 * vocab * ((6 if chunk >= FEWEST_TOKENS else 10) * chunk + 12 * min(chunk, block_tokens(vocab, device)))


def head_loss(
    hidden: Tensor,
    head: Head,
    objective: Objective,
    *,
    teacher: Lesson | TopK | None = None,
    next_tokens: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> HeadLoss:
    """Loss of all tokens, with the gradient of everything up to `hidden` done.

    Args:
        hidden: the student's final hidden states at target positions, (tokens, hidden); its graph is left alone.
        teacher: hidden states of the same tokens and a head, or their top-k words where `objective.takes_top_k`.
        next_tokens: ids (tokens,), for cross-entropy.
        temperature: of softened terms; their gradient is multiplied by its square.
        scale: factor on every gradient (1 / tokens of the optimizer step), not on the sums.
    """
    sums = torch.zeros(len(objective.terms), dtype=torch.float64, device=hidden.device)
    gradient = torch.empty_like(hidden)
    case = _Case(hidden, head, objective, teacher, next_tokens, temperature, scale)
    for tokens, found, part in case.in_words() if case.words else case.in_rows():
        sums += found
        gradient[tokens] = part
    head.reduce()
    values = sums.tolist()
    total = sum(term.weight * value for term, value in zip(objective.terms, values, strict=True))
    return HeadLoss(dict(zip(map(str, objective.terms), values, strict=True)), total, gradient)


ChunkLoss = tuple[slice, Tensor, Tensor]
"""Which tokens, the sum of each term (terms,), the gradient at their hidden states (chunk, hidden)."""


@dataclass(frozen=True)
class _Case:
    """Arguments of `head_loss`, and the two ways through them."""

    hidden: Tensor
    head: Head
    objective: Objective
    teacher: Lesson | TopK | None
    next_tokens: Tensor | None
    temperature: float
    scale: float

    @property
    def vocab(self) -> int:
        """The larger of both vocabularies."""
        return max(self.head.vocab, self.teacher.head.vocab if isinstance(self.teacher, Lesson) else 0)

    @property
    def most(self) -> int:
        """Tokens of a chunk."""
        return chunk_tokens(len(self.hidden), self.vocab, self.hidden.device)

    @property
    def words(self) -> int:
        """Words of a block, or 0 where chunks of whole rows hold enough tokens, or the objective needs whole rows."""
        enough = self.most >= min(FEWEST_TOKENS, len(self.hidden))
        whole = enough or any(term.name not in TERMS for term in self.objective.terms)
        return 0 if whole else max(1, self.vocab * self.most // FEWEST_TOKENS)

    def in_rows(self) -> Iterator[ChunkLoss]:
        """Whole rows of logits; no product is computed twice."""
        mine = self.head.buffer(self.most)
        theirs = self.teacher.head.buffer(self.most) if isinstance(self.teacher, Lesson) else None
        for chunk in parts(len(self.hidden), self.most):
            leaf = self.hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.head.into(mine, leaf)
            # Taken before the logits are overwritten: to autograd they are another view then, whose gradient it copies.
            made = get_gradient_edge(logits)
            gradient = logits.detach()
            sums = self._into_gradient(gradient, self._answer(chunk, theirs), self._targets(chunk))
            backward(made, gradient)
            assert leaf.grad is not None
            yield chunk, sums, leaf.grad

    def in_words(self) -> Iterator[ChunkLoss]:
        """Blocks of words."""
        width = self.words
        for chunk in parts(len(self.hidden), FEWEST_TOKENS):
            teacher = self.teacher
            student = Blocks(self.hidden[chunk], self.head, width)
            other = Blocks(teacher.hidden[chunk], teacher.head, width) if isinstance(teacher, Lesson) else None
            sums, gradient = loss_in_word_blocks(
                student, other, self.objective, self._targets(chunk),
                width=width, temperature=self.temperature, scale=self.scale,
            )  # fmt: skip
            yield chunk, sums, gradient

    def _targets(self, chunk: slice) -> Tensor | None:
        return None if self.next_tokens is None else self.next_tokens[chunk]

    @torch.no_grad()
    def _answer(self, chunk: slice, buffer: Tensor | None) -> Targets:
        if isinstance(self.teacher, Lesson):
            assert buffer is not None
            return self.teacher.head.into(buffer, self.teacher.hidden[chunk])
        return self.teacher[chunk] if self.teacher is not None else None

    def _into_gradient(self, logits: Tensor, answer: Targets, targets: Tensor | None) -> Tensor:
        """Overwrite a chunk's logits with their gradient, a block of rows at a time; returns the sum of each term."""
        sums = torch.zeros(len(self.objective.terms), dtype=torch.float64, device=logits.device)
        for rows in parts(len(logits), block_tokens(logits.shape[-1], logits.device)):
            said = answer[rows] if answer is not None else None
            words = targets[rows] if targets is not None else None
            values = gradient_over(logits[rows], self.objective, said, words, self.temperature, self.scale)
            sums += values.double().sum(-1)
        return sums
