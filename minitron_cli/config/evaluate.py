"""Options of `minitron eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from minitron_cli.config.base import StageConfig, argument, option
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig(StageConfig):
    """Measure a checkpoint: lm-evaluation-harness tasks, perplexity, bits per byte."""

    checkpoint: str = argument("Checkpoint to evaluate: a directory or a Hub id.", keyed=False)
    data: Path | None = option(
        None, "Prepared data set; perplexity and bits per byte on its validation split.", keyed=False
    )
    data_split: Literal["train", "validation"] = option("validation", "Split of --data to measure.")
    text: tuple[str, ...] = option(
        (),
        "Text as it is, in place of --data: files, directories, Hub data sets or `python-stdlib`; repeatable.",
        keyed=False,
    )
    text_column: str = option("text", "Column of JSONL, Parquet and Hub sources of --text that holds the text.")
    window: Annotated[int, Ge(2)] | None = option(
        None, "Tokens the model sees at once; default the sequences of --data, or for --text its context, at most 2048."
    )
    stride: Annotated[int, Ge(1)] | None = option(
        None, "Tokens a window moves on: small gives each token more context and takes longer; default a whole window."
    )
    tasks: tuple[str, ...] = option((), "Harness tasks or groups, separated by commas: `mmlu,arc_easy`.")
    data_dir: Path | None = option(
        None, "Folder with the tasks' files, so that nothing is downloaded: see docs/evaluating.md.", keyed=False
    )
    against: tuple[str, ...] = option(
        (),
        "Checkpoints to measure alike, such as the original; the table shows what is kept of each.",
        commas=True,
        keyed=False,
    )
    chat_template: bool = option(
        False, "Put questions into the tokenizer's chat template, solved examples as earlier turns."
    )
    log_samples: bool = option(False, "Keep every question, prompt and answer in OUT/samples/TASK.jsonl.")
    limit: Annotated[int, Ge(1)] | None = option(None, "Questions per task (per subject for mmlu); default all.")
    num_fewshot: Annotated[int, Ge(0)] | None = option(
        None, "Solved examples before each question; default is the task's standard, 5 for mmlu."
    )
    batch_size: Annotated[int, Ge(1)] | Literal["auto"] = option(
        "auto", "Sequences per forward pass; auto takes what memory and the prompts' lengths allow.", keyed=False
    )
    max_sequences: Annotated[int, Ge(1)] | None = option(None, "Sequences of --data, or windows, to read; default all.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", keyed=False)
    dtype: str = option("auto", "auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.")
    out: Path | None = option(
        None,
        "Directory to write; default: a folder of the user's cache, where the same command finds it again.",
        keyed=False,
    )
    force: bool = option(False, "Replace an existing output directory.", keyed=False)

    def __post_init__(self) -> None:
        given: Any = (self.tasks,) if isinstance(self.tasks, str) else self.tasks
        if isinstance(given, (tuple, list)) and all(
            isinstance(item, str) for item in given
        ):  # anything else is for the validation to refuse
            names = [name.strip() for item in given for name in item.split(",")]
            object.__setattr__(self, "tasks", tuple(dict.fromkeys(name for name in names if name)))
        super().__post_init__()

    def check(self) -> None:
        if self.data is None and not self.tasks and not self.text:
            raise ConfigError("eval needs --tasks (such as mmlu), --data (a prepared data set), --text, or several.")
        if self.data is not None and self.text:
            raise ConfigError("--data and --text both give the perplexity's text; choose one.")
        for name in ("window", "stride"):
            if getattr(self, name) is not None and self.data is None and not self.text:
                raise ConfigError(f"--{name} is about perplexity; say of what with --data or --text.")
        if not self.tasks:
            for name in ("data_dir", "chat_template", "log_samples"):
                if getattr(self, name):
                    option = name.replace("_", "-")
                    raise ConfigError(f"--{option} is about tasks; say which with --tasks, such as --tasks mmlu.")
