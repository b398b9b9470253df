"""Write packed sequences; memory is one buffer, whatever the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.manifest import write_json

INDEX = "dataset.json"
FORMAT = 1


def token_dtype(vocab_size: int) -> str:
    """The smallest on-disk type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class SplitWriter:
    """Append documents of token ids; cut into rows of `seq_len`; the last, incomplete row is dropped.

    `mask` marks training targets (1) per token; it is written when the first document carries one.
    """

    def __init__(self, directory: Path, name: str, seq_len: int, vocab_size: int, *, masked: bool = False) -> None:
        self.name, self.seq_len, self.masked = name, seq_len, masked
        self.dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._tokens = (directory / f"{name}.tokens").open("wb")
        self._mask = (directory / f"{name}.mask").open("wb") if masked else None
        self._pending = np.empty(0, self.dtype)
        self._pending_mask = np.empty(0, np.uint8)
        self.sequences = self.documents = self.tokens_seen = self.bytes_seen = 0

    def add(self, ids: npt.ArrayLike, text_bytes: int, mask: npt.ArrayLike | None = None) -> None:
        """Append one document: its ids with the separator, and the UTF-8 bytes of its text."""
        new = np.asarray(ids, self.dtype)
        self.documents += 1
        self.tokens_seen += len(new)
        self.bytes_seen += text_bytes
        self._pending = np.concatenate([self._pending, new])
        if self.masked:
            ones = np.ones(len(new), np.uint8) if mask is None else np.asarray(mask, np.uint8)
            self._pending_mask = np.concatenate([self._pending_mask, ones])
        rows = len(self._pending) // self.seq_len
        if rows:
            cut = rows * self.seq_len
            self._tokens.write(self._pending[:cut].tobytes())
            self._pending = self._pending[cut:]
            if self._mask is not None:
                self._mask.write(self._pending_mask[:cut].tobytes())
                self._pending_mask = self._pending_mask[cut:]
            self.sequences += rows

    def close(self) -> dict[str, int]:
        """Finish; returns the split's entry of dataset.json."""
        self._tokens.close()
        if self._mask is not None:
            self._mask.close()
        return {
            "sequences": self.sequences,
            "tokens": self.sequences * self.seq_len,
            "documents": self.documents,
            "tokens_seen": self.tokens_seen,
            "bytes_seen": self.bytes_seen,
        }


def write_index(directory: Path, *, seq_len: int, vocab_size: int, tokenizer: str, masked: bool,
                splits: dict[str, dict[str, int]], extra: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Write dataset.json, which makes the directory a data set."""
    index = {
        "format": FORMAT,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size),
        "tokenizer": tokenizer,
        "masked": masked,
        "splits": splits,
        **(extra or {}),
    }
    write_json(directory / INDEX, index)
