"""Read a prepared data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.errors import InputError
from minitron_cli.tokens.writer import FORMAT, INDEX


@dataclass(frozen=True)
class Split:
    """One split, memory-mapped: `tokens` (sequences, seq_len); `mask` the same shape or None."""

    name: str
    tokens: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8] | None
    bytes_per_token: float

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Token ids of some sequences, (len(indices), seq_len)."""
        return np.ascontiguousarray(self.tokens[list(indices)]).astype(np.int64)

    def targets(self, indices: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which tokens count as training targets, (len(indices), seq_len)."""
        if self.mask is None:
            return np.ones((len(indices), self.tokens.shape[1]), np.bool_)
        return np.ascontiguousarray(self.mask[list(indices)]).astype(np.bool_)


def is_prepared(directory: Path) -> bool:
    """Whether `data prepare` wrote the directory; its files may still be damaged."""
    return (directory / INDEX).is_file()


class TokenDataset:
    """A directory written by `data prepare`."""

    def __init__(self, directory: Path) -> None:
        """Open and check the directory.

        Raises:
            InputError: the path is missing, is not a prepared data set, or its files have the wrong size.
        """
        self.directory = directory
        if not directory.exists():
            raise InputError(f"{directory} does not exist; run `minitron data prepare` first.")
        try:
            self.index: dict[str, Any] = json.loads((directory / INDEX).read_text("utf-8"))
        except (OSError, ValueError):
            raise InputError(
                f"{directory} is not a prepared data set (no {INDEX}); run `minitron data prepare`."
            ) from None
        if self.index.get("format") != FORMAT:
            raise InputError(
                f"{directory} has data format {self.index.get('format')}; prepare it again with this version."
            )
        self.seq_len: int = self.index["seq_len"]
        self.vocab_size: int = self.index["vocab_size"]
        self.tokenizer: str = self.index["tokenizer"]

    def sequences(self, name: str) -> int:
        """How many sequences a split has; 0 where there is no such split."""
        return int(self.index["splits"].get(name, {}).get("sequences", 0))

    def split(self, name: str) -> Split:
        """Open one split.

        Raises:
            InputError: no such split, it is empty, or its file is truncated.
        """
        counts = self.index["splits"].get(name)
        if counts is None:
            raise InputError(f"{self.directory} has no split '{name}'; it has {', '.join(self.index['splits'])}.")
        if counts["sequences"] == 0:
            raise InputError(
                f"The {name} split of {self.directory} has no whole sequence of {self.seq_len} tokens; "
                "use more text or a smaller --seq-len in `minitron data prepare`."
            )
        shape = (counts["sequences"], self.seq_len)
        tokens = self._map(f"{name}.tokens", self.index["dtype"], shape)
        mask = self._map(f"{name}.mask", "uint8", shape) if self.index["masked"] else None
        return Split(name, tokens, mask, counts["bytes_seen"] / max(counts["tokens_seen"], 1))

    def _map(self, name: str, dtype: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
        path = self.directory / name
        kind = np.dtype(dtype).newbyteorder("<")
        needed = shape[0] * shape[1] * kind.itemsize
        if not path.exists() or path.stat().st_size != needed:
            raise InputError(f"{path} should hold {needed} bytes; it is damaged or missing, prepare the data again.")
        return np.memmap(path, kind, "r", shape=shape)
