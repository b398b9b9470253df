"""Fast ways through the objectives that most runs use, written over the logits they are given.

Each is what `gradient_into` does, from one exponential of each logit and at most one temporary, where the general way
takes two and seven. Values are divergences; softened gradients are multiplied by T^2, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_cli.config.objective import Objective
from minitron_cli.distill.losses import TopK
from minitron_cli.distill.terms import Targets, gradient_into
from minitron_cli.errors import ShapeError


@torch.no_grad()
def gradient_over(
    student: Tensor,
    objective: Objective,
    teacher: Targets,
    next_tokens: Tensor | None,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Write scale * d (weighted sum over terms and tokens) / d student over the student's logits, (tokens, vocab).

    A teacher's logits may be overwritten too. Returns each term's unweighted values, (terms, tokens).
    """
    first, *others = objective.terms
    if not others:
        scale_of_term = scale * first.weight
        if first.name == "kl" and isinstance(teacher, Tensor):
            return forward_kl_over(student, teacher, temperature, scale_of_term)[None]
        if first.name == "topk" and isinstance(teacher, TopK):
            top = teacher.first(int(first.parameter))
            return few_words_kl_over(student, top, temperature, scale_of_term)[None]
        if first.name == "ce" and next_tokens is not None:
            return few_words_kl_over(student, _one_word(next_tokens, student), 1.0, scale_of_term)[None]
    return gradient_into(student, objective, student, teacher, next_tokens, temperature, scale)


@torch.no_grad()
def forward_kl_over(student: Tensor, teacher: Tensor, temperature: float = 1.0, scale: float = 1.0) -> Tensor:
    """Forward KL, the default, over both logits (tokens, vocabularies); `teacher` holds nothing of use afterwards.

    KL = sum(p * (t - s)) - log-sum-exp t + log-sum-exp s. Returns values, (tokens,).
    """
    common = min(student.shape[-1], teacher.shape[-1])
    student[:, common:] = 0
    q, p = student[:, :common], teacher[:, :common]
    for logits in (q, p):
        if temperature != 1:
            logits /= temperature
        logits -= logits.amax(-1, keepdim=True)
    difference = p - q
    q_sum = q.exp_().sum(-1, keepdim=True)
    p_sum = p.exp_().sum(-1, keepdim=True)
    values = difference.mul_(p).sum(-1, keepdim=True) / p_sum - p_sum.log() + q_sum.log()
    factor = scale * temperature  # 1 / T of the softmax, T^2 of the softened term
    q.mul_(factor / q_sum).addcmul_(p, factor / p_sum, value=-1)
    return values[:, 0]


@torch.no_grad()
def few_words_kl_over(student: Tensor, top: TopK, temperature: float = 1.0, scale: float = 1.0) -> Tensor:
    """KL between distributions over k words and one for all others; with the next token alone it is cross-entropy.

    The gradient is q - p at the k words and q * (1 - p_tail / q_tail) elsewhere, so that only the student's own
    exponentials are as long as the vocabulary. Returns values, (tokens,).

    Raises:
        ShapeError: the teacher has more words than the student.
    """
    if top.vocab > student.shape[-1]:
        raise ShapeError(
            f"The cached teacher has {top.vocab} words and the student {student.shape[-1]}; cache the first "
            f"{student.shape[-1]}."
        )
    student[:, top.vocab :] = 0
    q = student[:, : top.vocab]
    if temperature != 1:
        q /= temperature
    known = q.gather(-1, top.ids)
    # Relative to the largest of the others, not of all: their sum is never lost beside a word that is nearly certain.
    q.scatter_(-1, top.ids, -torch.inf)
    largest = q.amax(-1, keepdim=True)
    q.sub_(largest).exp_()
    rest = q.sum(-1, keepdim=True)
    log_rest = rest.log() + largest
    log_total = torch.logaddexp(log_rest, known.logsumexp(-1, keepdim=True))
    p, p_tail = top.log_probs.exp(), top.log_tail.exp()[:, None]
    log_q, log_q_tail = known - log_total, log_rest - log_total
    log_tail = top.log_tail.clamp_min(-1e4)[:, None]  # a tail of nothing at all: 0 * -inf is not 0
    values = (p * (top.log_probs - log_q)).sum(-1, keepdim=True) + p_tail * (log_tail - log_q_tail)
    factor = scale * temperature
    q.mul_(factor * ((largest - log_total).exp() - p_tail / rest))
    q.scatter_(-1, top.ids, factor * (log_q.exp() - p))
    return values[:, 0]


def _one_word(next_tokens: Tensor, logits: Tensor) -> TopK:
    """All mass on the next token."""
    certain = torch.zeros(len(next_tokens), 1, dtype=logits.dtype, device=logits.device)
    return TopK(next_tokens[:, None], certain, torch.full_like(certain[:, 0], -torch.inf), logits.shape[-1])
