"""Distillation losses on logits: pure functions, fp32, in nats, summed over tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student), zero at equality; two (tokens, vocab) logits to (tokens,) fp32.

    At temperature T both softmaxes are taken of logits / T and nothing is multiplied by T^2: the value is a divergence.
    Vocabularies that differ by padding are compared over the common prefix, both renormalised there.
    """
    common = min(student.shape[-1], teacher.shape[-1])
    log_q = F.log_softmax(student[..., :common].float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher[..., :common].float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def cross_entropy(student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target): (tokens, vocab) logits and (tokens,) ids to (tokens,) fp32."""
    return F.cross_entropy(student.float(), targets, reduction="none")
