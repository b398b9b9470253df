"""Where training sequences come from: a prepared data set, or anything else that hands them out step by step.

Trainers know `Source` alone. `PreparedSource` is the data set on disk; `minitron_cli.data.streaming` has the
source that tokenises text while training runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minitron_cli.tokens.order import batch_rows
from minitron_cli.tokens.reader import Split, TokenDataset


@dataclass(frozen=True)
class Sequences:
    """Some sequences: `ids` (batch, seq) int64; `targets` (batch, seq) bool, which tokens count; `rows`, their numbers
    in the split of a prepared data set, empty for a stream.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.bool_]
    rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Sequences:
        return Sequences(self.ids[part], self.targets[part], self.rows[part])


class Source(Protocol):
    """Training sequences in an order that (content, seed) alone decide.

    `name` is how the user calls it; `length` the sequences of one pass, None where only reading them tells.
    `vocab_size` and `tokenizer` (an identity) say whose ids they are.
    """

    name: str
    seq_len: int
    vocab_size: int
    tokenizer: str
    length: int | None

    def batch(self, step: int) -> Sequences:
        """All sequences of one optimizer step. Steps are asked for in order, from 0 or from where `seek` went.

        Raises:
            RunError: what worked at the start cannot be read on.
            InputError: the data is not what it was when `state` was taken.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What `seek` needs to go on after the last batch; small, as JSON values."""
        ...

    def seek(self, step: int, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; the next batch asked for is that of `step`."""
        ...

    def close(self) -> None:
        """Let go of threads and files; may be called twice."""
        ...


class PreparedSource:
    """The train split of a prepared data set; a batch is a pure function of (seed, step), so there is no state."""

    def __init__(self, dataset: TokenDataset, seed: int, batch_size: int) -> None:
        """Open the train split.

        Raises:
            InputError: there is none, or it is empty or damaged.
        """
        self.split: Split = dataset.split("train")
        self.name, self.seq_len = str(dataset.directory), dataset.seq_len
        self.vocab_size, self.tokenizer = dataset.vocab_size, dataset.tokenizer
        self.length: int | None = len(self.split)
        self._seed, self._batch_size = seed, batch_size

    def batch(self, step: int) -> Sequences:
        """Rows of a fresh permutation in each pass."""
        return read_rows(self.split, batch_rows(self._seed, step, self._batch_size, len(self.split)))

    def state(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def seek(self, step: int, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Memory maps close themselves."""


def read_rows(split: Split, rows: Sequence[int]) -> Sequences:
    """Some rows of a split."""
    return Sequences(split.rows(rows), split.targets(rows), tuple(rows))
