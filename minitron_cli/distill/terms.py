"""An objective on logits: the value of each term, and the gradient of their weighted sum in closed form.

At temperature T both softmaxes are taken of logits / T and values are divergences, unscaled; the gradient of softened
terms is multiplied by T^2, since softening shrinks it so. Cross-entropy stays at temperature 1, over the student's
whole vocabulary, and `mse` and `cosine` compare raw logits. Vocabularies that differ by padding are compared over the
common prefix, both renormalised there.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from minitron_cli.config.objective import KINDS, Objective, Term
from minitron_cli.distill.losses import DIVERGENCES, ON_LOGITS, TopK, ValueAndSlope, cross_entropy, top_k, top_k_kl
from minitron_cli.errors import ShapeError

Targets = Tensor | TopK | None
"""What the teacher says of some tokens: its logits (tokens, vocab), or its likeliest words, or nothing."""


def loss_values(
    objective: Objective, student: Tensor, teacher: Targets, next_tokens: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Values of each term, unweighted, (terms, tokens); autograd can go through them.

    Args:
        student: logits (tokens, vocab).
        teacher: logits (tokens, its vocabulary), or top-k targets where `objective.takes_top_k`.
        next_tokens: ids (tokens,), for cross-entropy.
    """
    evaluation = _Evaluation(student, teacher, next_tokens, temperature)
    return torch.stack([evaluation.of(term)[1][0] for term in objective.terms])


@torch.no_grad()
def gradient_into(
    out: Tensor,
    objective: Objective,
    student: Tensor,
    teacher: Targets,
    next_tokens: Tensor | None,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Write scale * d (weighted sum over terms and tokens) / d student logits to `out`, which may be `student`.

    Returns what `loss_values` does.
    """
    evaluation = _Evaluation(student, teacher, next_tokens, temperature)
    values = []
    for term in objective.terms:
        part, (value, slope) = evaluation.of(term)
        part.collect(slope, term.weight * scale)
        values.append(value)
    evaluation.write(out)
    return torch.stack(values)


class _Part:
    """Some words of the student's logits, and the gradient with respect to them collected so far."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.slope: Tensor | None = None

    def collect(self, slope: Tensor, factor: float) -> None:
        """Add factor * slope; the first one is overwritten."""
        self.slope = slope.mul_(factor) if self.slope is None else self.slope.add_(slope, alpha=factor)

    def gradient(self, slope: Tensor) -> Tensor:
        """The collected slope as a gradient of logits."""
        return slope


class _Softmax(_Part):
    """The same through a softmax at some temperature: slopes are of log-probabilities."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        super().__init__(logits)
        self.temperature = temperature

    @cached_property
    def log_probs(self) -> Tensor:
        """Of the words of this part."""
        return F.log_softmax(self.logits if self.temperature == 1 else self.logits / self.temperature, dim=-1)

    def gradient(self, slope: Tensor) -> Tensor:
        """Log-softmax's backward, which divides by T, times T^2."""
        gradient = slope.addcmul_(self.log_probs.exp(), slope.sum(-1, keepdim=True), value=-1)
        return gradient if self.temperature == 1 else gradient.mul_(self.temperature)


class _Evaluation:
    """The inputs of an objective, each softmax taken at most once."""

    def __init__(self, student: Tensor, teacher: Targets, next_tokens: Tensor | None, temperature: float) -> None:
        student, vocab = _wide(student), student.shape[-1]
        known = vocab if teacher is None else teacher.vocab if isinstance(teacher, TopK) else teacher.shape[-1]
        if isinstance(teacher, TopK) and known > vocab:
            raise ShapeError(f"The cached teacher has {known} words and the student {vocab}; cache the first {vocab}.")
        common = min(vocab, known)
        self.next_tokens = next_tokens
        self.raw = _Part(student[:, :common])
        self.softened = _Softmax(student[:, :common], temperature)
        self.plain = self.softened if temperature == 1 and common == vocab else _Softmax(student, 1.0)
        self.cached = teacher if isinstance(teacher, TopK) else None
        self.teacher = _Softmax(_wide(teacher)[:, :common], temperature) if isinstance(teacher, Tensor) else None

    def of(self, term: Term) -> tuple[_Part, ValueAndSlope]:
        """A term's value and slope, and the part of the logits that the slope belongs to."""
        if term.name == "ce":
            assert self.next_tokens is not None, "cross-entropy needs the next tokens"
            return self.plain, cross_entropy(self.plain.log_probs, self.next_tokens)
        if term.name == "topk" and self.cached is not None:
            return self.softened, top_k_kl(self.softened.log_probs, self.cached.first(int(term.parameter)))
        assert self.teacher is not None, "the objective needs the teacher's logits"
        if term.name == "topk":
            top = top_k(self.teacher.log_probs, int(term.parameter))
            return self.softened, top_k_kl(self.softened.log_probs, top)
        if term.name in ON_LOGITS:
            return self.raw, ON_LOGITS[term.name](self.raw.logits, self.teacher.logits)
        extra = (term.parameter,) if KINDS[term.name].parameter else ()
        return self.softened, DIVERGENCES[term.name](self.softened.log_probs, self.teacher.log_probs, *extra)

    def write(self, out: Tensor) -> None:
        """The gradient of everything collected. `out` may hold the logits: all softmaxes are taken by now."""
        written = False
        for part in dict.fromkeys((self.plain, self.softened, self.raw)):  # the widest first
            if part.slope is None:
                continue
            gradient = part.gradient(part.slope)
            shared = out[:, : gradient.shape[-1]]
            if written:
                shared.add_(gradient)
            else:
                shared.copy_(gradient)
                out[:, gradient.shape[-1] :] = 0
                written = True


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
