"""Learning rates: warm-up, then one of four shapes."""

from __future__ import annotations

import math

from minitron_cli.config.distill import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of one step, counted from 0.

    Linear warm-up reaches the peak at its last step. Of the steps after it, `cosine` and `linear` take all to fall to
    `min_lr` times the peak at the very last; `wsd` (warm-up, stable, decay) keeps the peak and falls in a line over
    the last `decay` of all steps; `constant` stays.
    """
    warmup = warmup_steps(config.warmup, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    # A decay begins at the last step of the peak, so that its own first step is lower.
    first = warmup if config.schedule != "wsd" else max(warmup, steps - 1 - max(1, round(config.decay * steps)))
    progress = min(max(0.0, (step - first) / max(1, steps - first - 1)), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)


def warmup_steps(warmup: float, steps: int) -> int:
    """Below 1 a share of the steps, else a number of them; a share is at least one step, none but 0 is none."""
    if warmup >= 1:
        return round(warmup)
    return max(1, round(warmup * steps)) if warmup else 0
