"""Options of `minitron search`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from minitron_cli.config.base import StageConfig, argument, option
from minitron_cli.config.importance import LayerScore
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SearchConfig(StageConfig):
    """Find the best smaller shape in a parameter window: zero-shot loss, then a short distillation of the best few."""

    checkpoint: str = argument("Checkpoint to shrink: directory, Hub id or builtin:tiny-py.", keyed=False)
    params: str | None = option(None, "Parameter budget: 4B, 350M, or 50% of the original.")
    tolerance: str = option("5%", "Half width of the window around --params.")
    params_range: str | None = option(None, "The window itself, LO:HI, each like --params; bounds inclusive.")
    count: Literal["total", "non-embedding"] = option("total", "Which parameters the budget counts.")
    grid: tuple[str, ...] = option(
        (), "axis=values: hidden=96,112 or layers=29..32; repeat per axis. Default: automatic."
    )
    list: bool = option(False, "Print the feasible candidates and stop; needs config.json only.", keyed=False)
    importance: Path | None = option(None, "Scores from `minitron importance`.", keyed=False)
    data: Path | None = option(None, "Prepared data set.", keyed=False)
    out: Path | None = option(None, "Directory to write; appears only when complete.", keyed=False)
    force: bool = option(False, "Replace an existing output directory.", keyed=False)
    candidates: Annotated[int, Ge(1)] = option(
        16, "Candidates measured zero-shot: the largest of the window, spread over shapes."
    )
    finalists: Annotated[int, Ge(0)] = option(
        3, "Best candidates that are distilled briefly; 0 trusts the zero-shot loss."
    )
    steps: Annotated[int, Ge(1)] = option(100, "Optimizer steps of the short distillation.")
    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step.")
    lr: Annotated[float, Gt(0)] = option(1e-4, "Peak learning rate of the short distillation.")
    warmup: Annotated[float, Ge(0), Lt(1)] = option(0.05, "Share of the steps that warm up linearly.")
    min_lr: Annotated[float, Ge(0), Le(1)] = option(0.1, "Final learning rate as a share of the peak.")
    eval_sequences: Annotated[int, Ge(1)] = option(128, "Validation sequences per loss.")
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    save_every: Annotated[int, Ge(1)] = option(100, "Steps between checkpoints of the short distillation.", keyed=False)
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the data order.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Compute type; auto is bf16 on CUDA, else fp32.")

    def check(self) -> None:
        if (self.params is None) == (self.params_range is None):
            raise ConfigError("Give --params or --params-range, one of the two.")
        if not self.list:
            for name in ("importance", "data", "out"):
                if getattr(self, name) is None:
                    raise ConfigError(f"search needs --{name} (only --list does without).")
