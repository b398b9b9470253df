"""Options of `minitron bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from minitron_cli.config.base import StageConfig, argument, option
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchConfig(StageConfig):
    """Measure speed and memory on this machine, alone or against another checkpoint in alternating rounds."""

    checkpoint: str = argument("Checkpoint to measure: directory, Hub id or builtin:tiny-py.", keyed=False)
    against: str | None = option(None, "Checkpoint to compare with, such as the original.", keyed=False)
    batch_size: tuple[Annotated[int, Ge(1)], ...] = option(
        (1, 8), "Sequences generated at once; several, separated by commas.", commas=True
    )
    context: tuple[Annotated[int, Ge(1)], ...] = option(
        (512,), "Tokens of the prompt; several, separated by commas.", commas=True
    )
    new_tokens: Annotated[int, Ge(2)] = option(32, "Tokens generated after each prompt.")
    rounds: Annotated[int, Ge(1)] = option(5, "Measurements of each case, the checkpoints taking turns; medians count.")
    out: Path | None = option(None, "Directory for bench.json and a plot; default: print only.", keyed=False)
    force: bool = option(False, "Replace an existing output directory.", keyed=False)
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Compute type; auto is bf16 on CUDA, else fp32."
    )

    def check(self) -> None:
        for name in ("batch_size", "context"):
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')}: give at least one number.")
