"""What a run will do, hold and take: made before any model is loaded, printed by `--dry-run` and at the start."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron_cli.distill.memory import Case
from minitron_cli.runtime.memory import available_bytes
from minitron_cli.runtime.progress import byte_size, duration

MEASURED_SECONDS = 0.1


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes in bytes, of one process; `seconds` is rough: products only, at the speed of one product measured now."""

    steps: int
    tokens: int
    tokens_per_step: int
    passes: float | None
    batch_size: int
    micro_batch: int
    processes: int
    device: str
    dtype: str
    memory: dict[str, int]
    memory_free: int
    flops: float
    flops_per_second: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def make_plan(case: Case, steps: int, sequences: int | None, micro_batch: int) -> TrainingPlan:
    """Everything that is known beforehand.

    Args:
        sequences: in one pass over the data; None where only reading tells.
    """
    config = case.config
    per_step = config.batch_size * case.seq_len
    flops = float(step_flops(case) * steps)
    speed = product_speed(case, micro_batch) * case.spread.processes
    return TrainingPlan(
        steps=steps,
        tokens=steps * per_step,
        tokens_per_step=per_step,
        passes=steps * config.batch_size / sequences if sequences else None,
        batch_size=config.batch_size,
        micro_batch=micro_batch,
        processes=case.spread.processes,
        device=str(case.device),
        dtype=str(case.dtype).removeprefix("torch."),
        memory=case.memory(micro_batch),
        memory_free=available_bytes(case.device),
        flops=flops,
        flops_per_second=speed,
        seconds=round(flops / speed, 1),
    )


def step_flops(case: Case) -> int:
    """Of one optimizer step's matrix products: forward, twice that backward, again forward where activations are made
    anew; the teacher's forward. A token sees half of its sequence on average.
    """
    passes, seen = 4 if case.config.checkpoint_activations else 3, case.seq_len // 2
    per_token = passes * case.student.flops_per_token(seen)
    per_token += case.teacher.flops_per_token(seen) if case.teacher else 0
    return case.config.batch_size * case.seq_len * per_token


def product_speed(case: Case, micro_batch: int) -> float:
    """Floating point operations per second of a product as the student's MLP makes it, measured in a tenth of a second.

    Compute type and sizes are the run's: small products are slow, and bf16 is where the processor lacks it.
    """
    rows = min(micro_batch * case.seq_len, 2048)
    width, inner = case.student["hidden"], case.student.inner
    states = torch.ones(rows, width, dtype=case.dtype, device=case.device)
    weight = torch.ones(width, inner, dtype=case.dtype, device=case.device)
    torch.mm(states, weight)
    _wait(case.device)
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < MEASURED_SECONDS:
        torch.mm(states, weight)
        _wait(case.device)
        count += 1
    return 2.0 * rows * width * inner * max(count, 1) / passed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(plan: TrainingPlan) -> str:
    """The plan as lines of text."""
    steps = f"{plan.steps} steps of {plan.tokens_per_step:,} tokens"
    passes = f", {plan.passes:.2f} passes over the training data" if plan.passes is not None else ""
    whole = plan.micro_batch * plan.processes == plan.batch_size
    parts = "the whole batch" if whole else f"{plan.micro_batch} of {plan.batch_size} sequences"
    if plan.processes > 1:
        parts = f"{plan.micro_batch} of {plan.batch_size} sequences in each of {plan.processes} processes"
    held = ", ".join(f"{name} {byte_size(size)}" for name, size in plan.memory.items() if size)
    needed = sum(plan.memory.values())
    return (
        f"{steps}{passes}; {parts} per forward pass.\n"
        f"Memory: about {byte_size(needed)} of {byte_size(plan.memory_free)} free on {plan.device} ({held}).\n"
        f"Time: roughly {duration(plan.seconds)} ({plan.flops:.1e} FLOP, {plan.flops_per_second / 1e9:,.0f} GFLOP/s "
        f"in {plan.dtype} measured just now); the progress line soon knows better."
    )
