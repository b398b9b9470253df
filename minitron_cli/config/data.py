"""Options of `minitron data prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from minitron_cli.config.base import WritingConfig, argument, option, required
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig(WritingConfig):
    """Tokenise text, pack it into fixed-length sequences, split it into train and validation."""

    sources: tuple[str, ...] = argument(
        "Text, JSONL or Parquet files or directories of them, Hub data set ids, or `python-stdlib`. Read whole, in "
        "this order; or with `SOURCE@0.3` on each, mixed so that each gives that share of the train tokens.",
        keyed=False,
    )
    tokenizer: str = required("Checkpoint (directory or Hub id) whose tokenizer to use.", keyed=False)
    seq_len: Annotated[int, Ge(2)] = option(1024, "Tokens per sequence.")
    text_column: str = option("text", "Column of JSONL, Parquet and Hub sources that holds the text.")
    messages: str | None = option(None, "Column of chat messages; uses the chat template, trains on assistant turns.")
    subset: str | None = option(None, "Configuration name of a Hub data set.")
    hub_split: str = option("train", "Split of a Hub data set to read.")
    max_tokens: Annotated[int, Gt(0)] | None = option(None, "Stop when the train split holds this many tokens.")
    validation: Annotated[float, Ge(0), Le(0.5)] = option(
        0.025, "Share of documents kept for validation (1 in round(1/share), chosen by hash); 0 for none."
    )
    split_documents: Literal["auto", "blank-line", "line", "file"] = option(
        "auto",
        "What one document of a text file is. auto: a paragraph between blank lines in a .txt file named on the "
        "command line, the whole file otherwise (directories, code, Markdown).",
    )
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the order of files in a directory; rows and lines keep theirs.")
    workers: Annotated[int, Ge(0)] = option(0, "Tokeniser threads; 0 means one per core.", keyed=False)

    def check(self) -> None:
        if not self.sources:
            raise ConfigError("data prepare needs at least one SOURCE: a file, a directory, a Hub id or python-stdlib.")
        if self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise ConfigError(f"--max-tokens {self.max_tokens} is less than one sequence (--seq-len {self.seq_len}).")
