"""Distances between intermediate states: pure functions in fp32 (fp64 stays), one value per token, with gradients.

States are (tokens, channels); every function returns its value (tokens,) and the gradient of the values' sum at the
student's states. Zero at equality.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron_cli.distill.losses import ValueAndSlope, cosine, forward_kl
from minitron_cli.models.chunks import chunk_tokens, parts


def relative_squares(student: Tensor, teacher: Tensor) -> ValueAndSlope:
    """|student - teacher|^2 / |teacher|^2 of each token.

    Relative (as in Puzzle, arXiv 2411.19146, section 3.1, there over the whole state), because a few tokens of many
    models have states a thousand times longer than the others, and would be all that a plain mean sees.
    """
    difference = student - teacher
    length = teacher.square().sum(-1, keepdim=True).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (difference.square() / length).sum(-1), difference * (2 / length)


def relation_kl(student: Tensor, teacher: Tensor, heads: int) -> ValueAndSlope:
    """KL between how the tokens of one sequence relate to each other, in nats, mean over relation heads.

    A head's relations are softmax(X X^T / sqrt(channels)) over the sequence, X its queries, keys or values (MiniLMv2,
    arXiv 2012.15828, section 3.1). `heads` must divide the channels of both, which may differ.
    """
    mine, theirs = (states.view(len(states), heads, -1).transpose(0, 1) for states in (student, teacher))
    value = torch.zeros_like(student[:, 0])
    gradient = torch.empty_like(mine)
    for some in parts(heads, chunk_tokens(heads, len(student) ** 2, student.device)):
        log_q, log_p = _relations(mine[some]), _relations(theirs[some])
        found, slope = forward_kl(log_q, log_p)
        value += found.sum(0) / heads
        slope = slope.add_(log_q.exp()).div_(heads * math.sqrt(mine.shape[-1]))
        gradient[some] = (slope + slope.mT) @ mine[some]
    return value, gradient.transpose(0, 1).flatten(1)


def _relations(states: Tensor) -> Tensor:
    """(heads, tokens, channels) to log-probabilities (heads, tokens, tokens)."""
    return (states @ states.mT / math.sqrt(states.shape[-1])).log_softmax(-1)


MEASURES = {"cosine": cosine, "mse": relative_squares}
"""What `--state-loss` names."""
