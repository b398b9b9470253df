"""Distillation losses: pure functions in fp32 (fp64 stays), one value per token, in nats, with their slopes.

P is the teacher, log_p its log-probabilities (tokens, vocab); Q is the student, log_q its. Each divergence returns its
value and the slope dD / d log q, up to a multiple of q, which log-softmax's backward, slope - q * sum(slope), removes.
Written-down slopes are what spares training a graph over (tokens x vocabulary); values alone can go through autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from minitron_cli.errors import ShapeError

ValueAndSlope = tuple[Tensor, Tensor]
"""Per token (tokens,), and per token and word (tokens, vocab)."""


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution, short: ids (tokens, k) by falling probability, their log-probabilities (tokens, k),
    and the log of all other words' mass (tokens,).

    Log-probabilities are those of a softmax over the first `vocab` words, at the temperature of training.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocab: int

    def __getitem__(self, tokens: slice) -> Self:
        return type(self)(self.ids[tokens], self.log_probs[tokens], self.log_tail[tokens], self.vocab)

    def first(self, k: int) -> Self:
        """The k likeliest words; the others join the tail. Where k is vocab or more, the tail is one word.

        Raises:
            ShapeError: fewer words are held.
        """
        held, wanted = self.ids.shape[-1], max(1, min(k, self.vocab - 1))
        if wanted > held:
            raise ShapeError(f"Loss topk:{k} needs {wanted} words per token and the cached teacher holds {held}.")
        tail = torch.cat([self.log_probs[:, wanted:], self.log_tail[:, None]], dim=-1).logsumexp(-1)
        return type(self)(self.ids[:, :wanted], self.log_probs[:, :wanted], tail, self.vocab)


def top_k(log_p: Tensor, k: int) -> TopK:
    """The k likeliest words of log-probabilities; at most vocab - 1, where the tail is the one word left.

    The tail is the logsumexp of the words left out: 1 - sum would lose all digits where the teacher is sure.
    """
    vocab = log_p.shape[-1]
    log_probs, ids = log_p.topk(max(1, min(k, vocab - 1)), dim=-1)
    return TopK(ids, log_probs, log_p.scatter(-1, ids, -math.inf).logsumexp(-1), vocab)


def forward_kl(log_q: Tensor, log_p: Tensor) -> ValueAndSlope:
    """KL(P || Q)."""
    p = log_p.exp()
    return _dot(p, log_p - log_q), -p


def reverse_kl(log_q: Tensor, log_p: Tensor) -> ValueAndSlope:
    """KL(Q || P)."""
    q = log_q.exp()
    difference = log_q - log_p
    return _dot(q, difference), q * difference


def jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> ValueAndSlope:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649, equation 1)."""
    log_m = _log_mixture(log_p, log_q, beta)
    q = log_q.exp()
    difference = log_q - log_m
    value = beta * _dot(log_p.exp(), log_p - log_m) + (1 - beta) * _dot(q, difference)
    return value, (1 - beta) * q * difference


def skewed_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> ValueAndSlope:
    """KL(P || alpha P + (1 - alpha) Q) (DistiLLM, arXiv 2402.03898, section 3.1); forward KL at alpha = 0."""
    log_m = _log_mixture(log_p, log_q, alpha)
    return _dot(log_p.exp(), log_p - log_m), -(1 - alpha) * (log_p + log_q - log_m).exp()


def total_variation(log_q: Tensor, log_p: Tensor) -> ValueAndSlope:
    """Half of sum |p - q|: between 0 and 1, not in nats."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs().sum(-1) / 2, difference.sign() * q / 2


def top_k_kl(log_q: Tensor, top: TopK) -> ValueAndSlope:
    """KL between the distributions over k words and one for all others: a lower bound of forward KL."""
    rest = log_q.scatter(-1, top.ids, -math.inf)
    log_tail = top.log_tail.clamp_min(-1e4)  # a tail stored as nothing at all: 0 * -inf is not 0
    p, tail = top.log_probs.exp(), log_tail.exp()
    log_q_tail = rest.logsumexp(-1)
    value = _dot(p, top.log_probs - log_q.gather(-1, top.ids)) + tail * (log_tail - log_q_tail)
    slope = (rest - log_q_tail[:, None]).exp() * -tail[:, None]
    return value, slope.scatter(-1, top.ids, -p)


def mean_squares(student: Tensor, teacher: Tensor) -> ValueAndSlope:
    """Mean over the vocabulary of squared differences of logits, and its gradient."""
    difference = student - teacher
    return difference.square().mean(-1), difference * (2 / difference.shape[-1])


def cosine(student: Tensor, teacher: Tensor) -> ValueAndSlope:
    """1 - cosine of logits, as half the squared distance of unit vectors (zero at equality), and its gradient."""
    length = student.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(student.dtype).tiny)
    unit = student / length
    target = F.normalize(teacher, dim=-1, eps=torch.finfo(teacher.dtype).tiny)
    value = (unit - target).square().sum(-1) / 2
    return value, (unit * (unit * target).sum(-1, keepdim=True) - target) / length


def cross_entropy(log_q: Tensor, targets: Tensor) -> ValueAndSlope:
    """-log q(target), of ids (tokens,)."""
    index = targets[:, None]
    return -log_q.gather(-1, index)[:, 0], torch.zeros_like(log_q).scatter_(-1, index, -1.0)


DIVERGENCES: dict[str, Callable[..., ValueAndSlope]] = {
    "kl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "skl": skewed_kl,
    "tv": total_variation,
}
"""Of log-probabilities (log_q, log_p), and beta or alpha where there is one."""
ON_LOGITS: dict[str, Callable[[Tensor, Tensor], ValueAndSlope]] = {"mse": mean_squares, "cosine": cosine}
"""Of raw logits (student, teacher); the slope is the gradient."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), finite where both probabilities underflow."""
    if share == 0:
        return log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
