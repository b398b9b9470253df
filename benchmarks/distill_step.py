"""One distillation step against its floor: the bare forward and backward passes of the same models.

python -m benchmarks.distill_step
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading, interleaved  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.importance.weights import weight_norm_scores  # noqa: E402
from minitron_cli.models.load import load_model  # noqa: E402
from minitron_cli.prune.plan import make_plan  # noqa: E402
from minitron_cli.search.measure import cut_in_memory  # noqa: E402

SEQUENCES, LENGTH = 8, 256


def main() -> None:
    """Print seconds per step and tokens per second."""
    heading(f"A distillation step of the quickstart: {SEQUENCES} sequences of {LENGTH} tokens")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checkpoint = Checkpoint(resolve("builtin:tiny-py"))
    plan = make_plan(
        checkpoint.shape, weight_norm_scores(checkpoint), {"layers": 5, "ffn": 176}, ranked_by="weight norms"
    )
    teacher = Teacher(load_model(checkpoint.path, device=device, dtype=dtype))
    config = DistillConfig(student="s", teacher="t", data=Path("d"), out=Path("o"), steps=1000)
    trainer = Trainer(cut_in_memory(checkpoint, plan, device, torch.float32), config, 1000, dtype)
    plain = replace(config, loss="ce", teacher=None)
    alone = Trainer(cut_in_memory(checkpoint, plan, device, torch.float32), plain, 1000, dtype)
    bare = cut_in_memory(checkpoint, plan, device, torch.float32).train()
    ids = torch.randint(0, 2048, (SEQUENCES, LENGTH), device=device)
    batch = Batch(ids, torch.ones(SEQUENCES, LENGTH - 1, dtype=torch.bool, device=device))

    def floor() -> None:
        """Teacher forward, student forward and backward, nothing else."""
        with torch.no_grad():
            teacher.model(ids)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            bare(ids).logits.mean().backward()
        bare.zero_grad(set_to_none=True)

    runs = {
        "bare passes (floor)": floor,
        "distill step": lambda: _step(trainer, batch, teacher),
        "cross-entropy step": lambda: _step(alone, batch, None),
    }
    medians = interleaved(runs, rounds=9)
    base = medians["bare passes (floor)"]
    for name, seconds in medians.items():
        rate = SEQUENCES * LENGTH / seconds
        print(f"{name:<22}{1000 * seconds:9.1f} ms{rate:12,.0f} tokens/s{seconds / base:8.2f} x floor")


def _step(trainer: Trainer, batch: Batch, teacher: Teacher | None) -> None:
    trainer.update([batch], [teacher.lesson(batch)] if teacher else [], 0)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
