"""Blocks of packed sequences on their way from documents to batches."""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.data.tokenise import Encoded
from minitron_cli.tokens import Sequences


@dataclass(frozen=True)
class Place:
    """Where a block begins: the pass, how many of its shards are done, document and token of the next shard."""

    turn: int = 0
    shard: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Block:
    """Sequences in the order of their use: `ids` (sequences, seq_len), `mask` of the same shape or None."""

    ids: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.uint8] | None
    following: Place

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Sequences:
        ids = self.ids[part].astype(np.int64)
        targets = np.ones(ids.shape, np.bool_) if self.mask is None else self.mask[part].astype(np.bool_)
        return Sequences(ids, targets)

    def checksum(self) -> int:
        """CRC-32 of the tokens."""
        return zlib.crc32(self.ids.tobytes())


class Packer:
    """Collects documents until they fill a block; `place` is where the next block begins."""

    def __init__(self, seq_len: int, seed: int, place: Place) -> None:
        self.seq_len, self.seed, self.place = seq_len, seed, place
        self.tokens = 0
        self._skipped = place.token
        self._ids: list[npt.NDArray[np.uint32]] = []
        self._masks: list[npt.NDArray[np.uint8]] = []

    @property
    def sequences(self) -> int:
        """Whole ones."""
        return self.tokens // self.seq_len

    def add(self, item: Encoded) -> None:
        """Append a document; the first one without the tokens that an earlier block took."""
        self._ids.append(item.ids[self._skipped :])
        if item.mask is not None:
            self._masks.append(item.mask[self._skipped :])
        self.tokens += len(self._ids[-1])
        self._skipped = 0

    def block(self, rows: int, following: Place) -> Block:
        """The first `rows` sequences, shuffled; the tokens after them stay."""
        order = np.random.Generator(np.random.PCG64([self.seed, *astuple(self.place)])).permutation(rows)
        ids = packed(self._ids, rows, self.seq_len)[order]
        mask = packed(self._masks, rows, self.seq_len)[order] if self._masks else None
        self.tokens -= rows * self.seq_len
        self._ids, self._masks = _last(self._ids, self.tokens), _last(self._masks, self.tokens)
        self.place = following
        return Block(ids, mask, following)


def _last(parts: list[npt.NDArray[Any]], count: int) -> list[npt.NDArray[Any]]:
    """The last tokens of some documents."""
    if not parts:
        return []
    joined = np.concatenate(parts)
    return [joined[len(joined) - count :].copy()]


def packed(parts: list[npt.NDArray[Any]], rows: int, seq_len: int) -> npt.NDArray[Any]:
    """The first tokens of some documents as (rows, seq_len)."""
    return np.concatenate(parts)[: rows * seq_len].reshape(rows, seq_len)
