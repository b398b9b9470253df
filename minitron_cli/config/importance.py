"""Options of `minitron importance`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from minitron_cli.config.base import WritingConfig, argument, option, required

Aggregator = Literal["mean", "l2", "var"]


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(WritingConfig):
    """Score heads, neurons, channels and layers with forward passes over calibration text."""

    checkpoint: str = argument("Checkpoint to score: directory, Hub id or builtin:tiny-py.", keyed=False)
    data: Path = required("Prepared data set; calibration sequences come from its train split.", keyed=False)
    samples: Annotated[int, Ge(1)] = option(1024, "Calibration sequences.")
    loss_samples: Annotated[int, Ge(0)] = option(
        32, "Sequences for the loss increase of each removed layer; 0 skips it."
    )
    batch_size: Annotated[int, Ge(1)] = option(8, "Sequences per forward pass.")
    batch_agg: Aggregator = option("l2", "Aggregation over sequences.")
    seq_agg: Aggregator = option("mean", "Aggregation over the tokens of a sequence.")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the calibration draw.")
    save_every: Annotated[int, Ge(1)] = option(16, "Batches between checkpoints of the scores.", keyed=False)
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: str = option("auto", "auto (bf16 on CUDA, else fp32), float32, bfloat16, float16.")
