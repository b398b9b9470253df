"""What an alignment will do and hold: made before any model is loaded, printed by `--dry-run` and at the start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron_cli.align.sampling import LOGITS
from minitron_cli.config.align import AlignConfig
from minitron_cli.distill.memory import kept_per_token
from minitron_cli.runtime.memory import available_bytes
from minitron_cli.runtime.progress import byte_size
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class AlignPlan:
    """Sizes in bytes; `responses`: sampled per step, of which `trained` enter the gradient."""

    method: str
    steps: int
    prompts: int
    eval_prompts: int
    held_out: bool
    longest_prompt: int
    max_new_tokens: int
    responses: int
    trained: int
    device: str
    dtype: str
    memory: dict[str, int]
    memory_free: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def memory_of(
    config: AlignConfig, policy: Shape, teacher: Shape | None, longest: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes held at the peak of a step, by part; the reward's own models are not in it."""
    size, length = dtype.itemsize, longest + config.max_new_tokens
    kept = kept_per_token(policy) * (1 if config.checkpoint_activations else policy["layers"])
    if config.checkpoint_activations:
        kept += policy["layers"] * policy["hidden"]
    logits = min(LOGITS, config.micro_batch * length * policy["vocab"])
    training = config.micro_batch * length * kept * size + 16 * logits
    writer = max((policy, teacher), key=lambda shape: shape.kv_bytes_per_token(size) if shape else 0)
    assert writer is not None
    drawn = min(LOGITS, config.sample_batch * policy["vocab"]) * 24
    sampling = config.sample_batch * length * writer.kv_bytes_per_token(size) + drawn
    others = 1 + config.moving_anchor
    return {
        "weights": 4 * policy.params,
        "gradients": 4 * policy.params,
        "optimizer": 8 * policy.params,
        "the policy as it was, and the anchor": others * 4 * policy.params,
        "rounded weights": size * policy.params if size < 4 else 0,
        "teacher": size * teacher.params if teacher else 0,
        "training or sampling": max(training, sampling),
    }


def make_plan(
    config: AlignConfig, policy: Shape, teacher: Shape | None, prompts: int, kept: int, held_out: bool, longest: int,
    device: torch.device, dtype: torch.dtype,
) -> AlignPlan:  # fmt: skip
    """Everything that is known beforehand."""
    own = config.own_samples if config.backward > 0 else 0
    best = 1 if config.anchor_samples and config.backward < 1 else 0
    return AlignPlan(
        method=config.method,
        steps=config.steps,
        prompts=prompts,
        eval_prompts=kept,
        held_out=held_out,
        longest_prompt=longest,
        max_new_tokens=config.max_new_tokens,
        responses=config.batch_size * (config.own_samples + config.anchor_samples),
        trained=config.batch_size * (own + best),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory=memory_of(config, policy, teacher, longest, dtype),
        memory_free=available_bytes(device),
    )


def describe(plan: AlignPlan) -> str:
    """The plan as lines of text."""
    held = ", ".join(f"{name} {byte_size(size)}" for name, size in plan.memory.items() if size)
    measured = "kept from training" if plan.held_out else "the same ones"
    return (
        f"{plan.method}: {plan.steps} steps, each of {plan.responses} responses of up to {plan.max_new_tokens} tokens, "
        f"{plan.trained} of them trained on.\n"
        f"Prompts: {plan.prompts} of up to {plan.longest_prompt} tokens; measured on {plan.eval_prompts}, {measured}.\n"
        f"Memory: about {byte_size(sum(plan.memory.values()))} of {byte_size(plan.memory_free)} free on {plan.device} "
        f"({held})."
    )
