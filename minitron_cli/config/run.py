"""Options of `minitron run` and `minitron compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from minitron_cli.config.base import StageConfig, argument, option, required


@dataclass(frozen=True, kw_only=True)
class RunConfig(StageConfig):
    """The whole chain from a recipe; finished stages are reused, interrupted ones resume."""

    recipe: str = argument(
        "A YAML file, or a shipped name: quickstart, width, depth, two-stage, corrected, quickstart-teacher."
    )
    out: Path | None = option(None, "Directory of the run; default runs/NAME.")
    set: tuple[str, ...] = option((), "Change a recipe key, such as distill.steps=400; repeat for more.")
    force: bool = option(False, "Redo stages whose directories hold another configuration's result.")


@dataclass(frozen=True, kw_only=True)
class CompressConfig(StageConfig):
    """The whole chain with good defaults: score, search, prune, distill, evaluate, report."""

    checkpoint: str = argument("Checkpoint to compress: directory, Hub id or builtin:tiny-py.")
    params: str = required("Parameter budget: 4B, 350M, or 50% of the original.")
    data: tuple[str, ...] = required("Training text, as in `data prepare`; repeat for more sources.")
    out: Path = required("Directory of the run.")
    tokens: Annotated[int, Ge(1)] = option(10_000_000, "Training tokens of the final distillation.")
    seq_len: Annotated[int, Ge(2)] | None = option(None, "Tokens per sequence; default the context, at most 1024.")
    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step.")
    text_column: str = option("text", "Column that holds the text.")
    tasks: tuple[str, ...] = option((), "Harness tasks to evaluate, such as mmlu.")
    data_dir: Path | None = option(None, "Folder with the tasks' files.")
    force: bool = option(False, "Redo stages whose directories hold another configuration's result.")
