"""The result of an alignment as text."""

from __future__ import annotations

from typing import Any


def format_align(result: dict[str, Any]) -> str:
    """Reward and KL before and after, beside best-of-n sampling."""
    ended = f", stopped by: {result['stopped']}" if result["stopped"] else ""
    lines = [
        f"{result['out']}: {result['method']}, {result['steps']} steps{ended}",
        f"  {'one sample of':<26}{'reward':>18}{'KL, nats':>18}",
    ]
    for each in result["best_of"]:
        name = "the policy as it was" if each["n"] == 1 else f"  best of {each['n']} of them"
        bound = "0" if each["n"] == 1 else f"at most {each['kl']:.3f}"
        lines.append(f"  {name:<26}{_interval(each['reward'], each['reward_error']):>18}{bound:>18}")
    after = _interval(result["reward_after"], result["reward_after_error"])
    lines.append(f"  {'the aligned policy':<26}{after:>18}{_interval(result['kl'], result['kl_error']):>18}")
    lines.append(
        f"  it wins {100 * result['win_rate']:.1f} % against one sample of before; {result['eval_samples']} responses "
        f"to {result['eval_prompts']} prompts, 95 % intervals over prompts"
    )
    return "\n".join(lines)


def _interval(mean: float, error: float) -> str:
    return f"{mean:.4f} ± {error:.4f}"
