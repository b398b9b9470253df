"""Options of `minitron importance`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from minitron_cli.config.base import WritingConfig, argument, option, required
from minitron_cli.errors import ConfigError

Aggregator = Literal["mean", "l2", "var"]
LayerScore = Literal["auto", "loss", "kl", "mse", "task", "bi", "block", "greedy"]
"""What may decide which layers leave."""
WidthScore = Literal["auto", "activation", "contribution", "fluctuation"]
"""What may decide which neurons and heads leave."""
Statistic = Literal["auto", "none", "directions", "weighted"]
"""What may be gathered beside activations."""
ExpertScore = Literal["reap", "activation", "frequency"]
"""What may decide which routed experts leave."""


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(WritingConfig):
    """Score heads, neurons, channels, experts and layers with forward passes over calibration text."""

    checkpoint: str = argument("Checkpoint to score: directory, Hub id or builtin:tiny-py.", keyed=False)
    data: Path = required("Prepared data set; calibration sequences come from its train split.", keyed=False)
    samples: Annotated[int, Ge(1)] = option(1024, "Calibration sequences.")
    loss_samples: Annotated[int, Ge(0)] = option(
        32, "Sequences for loss, KL and distance without some layers; 0 skips these."
    )
    depth: Literal["single", "block", "greedy"] = option(
        "single", "Remove each layer alone, each run of --remove layers, or the least harmful layer --remove times."
    )
    remove: Annotated[int, Ge(1)] | None = option(None, "Layers that --depth block and greedy remove.")
    depth_metric: Literal["loss", "kl", "mse", "task"] = option(
        "loss", "What decides: next-token loss, KL of the logits, distance before the head, or --depth-task."
    )
    depth_task: str | None = option(
        None, "Task of `minitron eval` to score without the same layers, such as mmlu; needs the model in memory."
    )
    depth_task_dir: Path | None = option(
        None, "Folder with the task's files, so that nothing is downloaded: MMLU as CSV (dev/, test/).", keyed=False
    )
    depth_task_limit: Annotated[int, Ge(1)] | None = option(
        None, "Questions of --depth-task (per subject for mmlu); default all."
    )
    collect: tuple[Statistic, ...] = option(
        ("auto",),
        "Further statistics: directions of the residual stream, for `prune --rotate`; scores weighted by outgoing "
        "weights, for `prune --width-score`; or none. Auto is all that the model has a use for.",
        commas=True,
    )
    carry_bytes: Annotated[int, Ge(1)] | None = option(
        None, "Memory for the states of models without some layers; default a quarter of what is free.", keyed=False
    )
    batch_size: Annotated[int, Ge(1)] = option(8, "Sequences per forward pass.")
    stream: bool = option(
        False, "Load one layer at a time; automatic where the model does not fit into memory.", keyed=False
    )
    batch_agg: Aggregator = option("l2", "Aggregation over sequences.")
    seq_agg: Aggregator = option("mean", "Aggregation over the tokens of a sequence.")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the calibration draw.")
    save_every: Annotated[int, Ge(1)] = option(16, "Batches between checkpoints of the scores.", keyed=False)
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: str = option("auto", "auto (bf16 on CUDA, else fp32), float32, bfloat16, float16.")

    def check(self) -> None:
        if len(self.collect) > 1 and not {"auto", "none"}.isdisjoint(self.collect):
            raise ConfigError("--collect takes auto, none, or a list of directions and weighted.")
        if (self.depth == "single") != (self.remove is None):
            raise ConfigError(
                "--depth block and greedy need --remove, the number of layers; --depth single takes none."
            )
        if self.depth_task is None:
            for name in ("depth_task_dir", "depth_task_limit"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name.replace('_', '-')} needs --depth-task, such as --depth-task mmlu.")
            if self.depth_metric == "task":
                raise ConfigError("--depth-metric task needs --depth-task, such as --depth-task mmlu.")
        if self.depth != "single" and self.depth_metric != "task" and not self.loss_samples:
            raise ConfigError(f"--depth {self.depth} needs --loss-samples above 0, or --depth-metric task.")
