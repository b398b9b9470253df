"""The mathematics of best-of-N distillation (BOND, arXiv 2407.14622): pure functions of probabilities and rewards.

An output's quantile is the probability that a sample of the reference has at most its reward. Everything here depends
on rewards through their order alone. Probabilities and rewards are (..., outcomes); samples are (..., samples).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

JBOND_PENALTY = -math.log(16.0)
"""J-BOND's reward of an output below both of two others; its mean at the median is log 0.5 (section 5, Eq. 18)."""


def quantiles(ref_probs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, by output, that a sample of the reference has a lower reward, and that it has at most this one."""
    below = rewards[..., None, :] < rewards[..., :, None]
    equal = rewards[..., None, :] == rewards[..., :, None]
    lower = (below * ref_probs[..., None, :]).sum(-1)
    at_most = lower + (equal * ref_probs[..., None, :]).sum(-1)
    return lower, at_most


def best_of_n_factors(ref_probs: Tensor, rewards: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Theorem 1: pi_BoN = ref * A * B, with A = at_most^(n-1) and B, in [1, n], for samples that are equally good."""
    lower, at_most = quantiles(ref_probs, rewards)
    ratio = lower / at_most.clamp_min(_tiny(at_most))
    powers = ratio[..., None] ** torch.arange(n, dtype=ratio.dtype, device=ratio.device)
    return at_most ** (n - 1), powers.sum(-1)


def best_of_n_distribution(ref_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The distribution of the best of n samples of the reference, ties broken at random; nothing cancels in it."""
    a, b = best_of_n_factors(ref_probs, rewards, n)
    return ref_probs * a * b


def bond_reward(ref_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The reward whose optimum under KL to the reference with weight 1 / (n - 1) is best-of-n (Eq. 8)."""
    a, b = best_of_n_factors(ref_probs, rewards, n)
    return (a.log() + b.log()) / (n - 1)


def log_quantile(rewards: Tensor, ref_rewards: Tensor) -> Tensor:
    """Log-quantiles from k samples of the reference: log((c + 1) / (k + 1)), c of them with at most the reward.

    Counting the output itself keeps the logarithm finite where all k are better.

    Args:
        rewards: (..., outputs).
        ref_rewards: (..., k).
    """
    count = (ref_rewards[..., None, :] <= rewards[..., :, None]).sum(-1)
    return torch.log((count + 1) / (ref_rewards.shape[-1] + 1))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats; infinite where q misses an outcome of p."""
    return torch.where(p > 0, p * (p.clamp_min(_tiny(p)).log() - q.log()), 0.0).sum(-1)


def jeffreys(policy: Tensor, target: Tensor, beta: float) -> Tensor:
    """(1 - beta) KL(target || policy) + beta KL(policy || target): forward and backward (Eq. 9)."""
    total = torch.zeros_like(policy[..., 0])
    if beta < 1:
        total = total + (1 - beta) * kl_divergence(target, policy)
    if beta > 0:
        total = total + beta * kl_divergence(policy, target)
    return total


def forward_gradient(policy: Tensor, target: Tensor) -> Tensor:
    """Gradient of KL(target || policy) in the logits of a softmax policy: -E_target[grad log policy]."""
    return policy - target


def backward_gradient(policy: Tensor, ref_probs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Gradient of KL(policy || best-of-n) in the logits of a softmax policy, as a policy gradient on `bond_reward`.

    -(n - 1) E_policy[grad log policy * (r - (log policy - log ref) / (n - 1))]; the factor n - 1 sets the balance with
    the forward part.
    """
    value = bond_reward(ref_probs, rewards, n) - (policy.log() - ref_probs.log()) / (n - 1)
    return -(n - 1) * policy * (value - (policy * value).sum(-1, keepdim=True))


def jbond_reward(rewards: Tensor, pair: Tensor) -> Tensor:
    """-log 16 for outputs strictly below both of two samples of the anchor, else 0 (Eq. 17).

    Args:
        rewards: (..., outputs).
        pair: (..., 2) rewards of the anchor's samples.
    """
    return torch.where(rewards < pair.amin(-1, keepdim=True), JBOND_PENALTY, 0.0)


def jbond_fixed_point(anchor_probs: Tensor, rewards: Tensor) -> Tensor:
    """Where J-BOND's backward part ends under a fixed anchor: anchor * 16^-(1 - at_most)^2, near best-of-2 only."""
    _, at_most = quantiles(anchor_probs, rewards)
    weights = anchor_probs * torch.exp(JBOND_PENALTY * (1 - at_most) ** 2)
    return weights / weights.sum(-1, keepdim=True)


def leave_one_out(values: Tensor) -> Tensor:
    """Each value less the mean of the others along the last axis; a single one is left as it is."""
    count = values.shape[-1]
    if count == 1:
        return values
    return (values - values.mean(-1, keepdim=True)) * (count / (count - 1))


def kl_best_of_n(n: int) -> float:
    """KL(best-of-n || reference) in nats where no two outputs tie; an upper bound where some do (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def kl_to_best_of_n(n: int) -> float:
    """KL(reference || best-of-n) in nats where no two outputs tie."""
    return (n - 1) - math.log(n)


def win_rate(n: int) -> float:
    """How often best-of-n beats one sample of the reference where no two outputs tie."""
    return n / (n + 1)


def expected_best(rewards: Tensor, n: int) -> Tensor:
    """The mean reward of the best of n, without bias from (..., samples) rewards of m >= n samples.

    The i-th smallest of m is the largest of a random subset of n with probability C(i-1, n-1) / C(m, n).

    Raises:
        ValueError: fewer than n samples.
    """
    count = rewards.shape[-1]
    if count < n:
        raise ValueError(f"{count} samples hold no subset of {n}")
    chances = [math.comb(place, n - 1) / math.comb(count, n) for place in range(count)]
    weights = torch.tensor(chances, dtype=rewards.dtype, device=rewards.device)
    return (rewards.sort(-1).values * weights).sum(-1)


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
