"""What each sample's log-likelihood is multiplied by: every method is a weighted sum of log-likelihoods.

The gradient of a step is that of sum(weight * log policy(sample)), averaged over prompts, with the weights held fixed.
Returns have a leave-one-out baseline over the samples they are compared with. Tensors are (prompts, samples).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_cli.align.bond import jbond_reward, leave_one_out, log_quantile


def bond_backward(rewards: Tensor, ref_rewards: Tensor, log_ratio: Tensor, n: int, beta: float) -> Tensor:
    """BOND's weights of policy samples: beta (n - 1) (log-quantile - log-ratio / (n - 1)), centred over the batch.

    Args:
        rewards: (prompts, samples) of the policy.
        ref_rewards: (prompts, k) of the anchor.
        log_ratio: log policy - log anchor of the policy's samples, in nats per sequence.
    """
    value = log_quantile(rewards, ref_rewards).to(log_ratio) - log_ratio / (n - 1)
    return beta * (n - 1) * _centred(value)


def jbond_backward(rewards: Tensor, pair: Tensor, log_ratio: Tensor, beta: float, gamma: float) -> Tensor:
    """J-BOND's weights of policy samples (Algorithm 2), with the regulariser's sign that lowers KL(policy || anchor).

    Args:
        pair: (prompts, 2) rewards of the anchor's samples.
    """
    value = jbond_reward(rewards, pair).to(log_ratio) - log_ratio
    return beta * _centred(value) - gamma * _centred(log_ratio)


def reinforce(rewards: Tensor, log_ratio: Tensor, kl_weight: float) -> Tensor:
    """REINFORCE on reward - kl_weight * log-ratio; the baseline is that of the prompt's other samples."""
    return leave_one_out(rewards.to(log_ratio) - kl_weight * log_ratio)


def best(rewards: Tensor) -> Tensor:
    """The place of each prompt's best sample, (prompts,): the first of equals, which is a random one of them."""
    return (rewards == rewards.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def _centred(values: Tensor) -> Tensor:
    return leave_one_out(values.flatten()).view_as(values)
