"""A teacher's answers on disk: per target token its k likeliest words and the mass of all others, in one fixed record.

A directory written by `--cache-teacher` holds
    records.bin         the records of every sequence, one after another: a sequence is one positioned read
    index.safetensors   rows (sequences,): which sequence of the train split; starts (sequences + 1,): its first record
    minitron.json       what the answers are of: teacher, data, temperature, vocabulary, k
Tokens that are no target have no record. A record of k words is k ids of ceil(log2 vocab) bits, k log-probabilities and
the tail's, of 16 bits each: 104 bytes at k = 24 and 18 bits.

Log-probabilities are whole multiples of 1/1024 nat down to -64 nats. Reading makes the k + 1 masses sum to 1 again, so
a record is a distribution P~ whose log-probabilities are off by at most 1/2048 before that; by Hoeffding's lemma
KL(P || P~) is then below (1/2048)^2 / 2 = 1.2e-7 nats, far below what cutting at k words costs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from minitron_cli.config.base import StageConfig
from minitron_cli.distill.bits import bits_for, pack, packed_bytes, unpack
from minitron_cli.distill.losses import TopK
from minitron_cli.errors import InputError, RunError
from minitron_cli.manifest import MANIFEST, read_manifest

STAGE = "cached teacher"
RECORDS, INDEX = "records.bin", "index.safetensors"
FORMAT = 1
STEPS = 1024
"""Steps of a stored log-probability per nat."""
LOWEST = (1 << 16) - 1
"""The largest stored number of steps: -64 nats, a mass that counts for nothing."""
ERROR = 0.5 / STEPS
"""How far a stored log-probability is off, at most, in nats (above the lowest)."""

Records = npt.NDArray[np.uint8]
"""(tokens, bytes of a record)."""


@dataclass(frozen=True, kw_only=True)
class Content(StageConfig):
    """What decides the records of a cache, beside teacher, data and sequences."""

    vocab: int
    top_k: int
    temperature: float
    dtype: str
    format: int = FORMAT

    @property
    def record(self) -> Record:
        """The layout of one token."""
        return Record(self.vocab, self.top_k)


@dataclass(frozen=True)
class Record:
    """The layout of one token's answer: `k` of `vocab` words (at most vocab - 1) and the rest."""

    vocab: int
    k: int

    @property
    def id_bits(self) -> int:
        """Bits of a word's id."""
        return bits_for(self.vocab)

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return packed_bytes(self.k, self.id_bits) + 2 * (self.k + 1)

    def encode(self, top: TopK) -> Records:
        """(tokens, nbytes) of an answer of k words.

        Raises:
            RunError: a log-probability is NaN.
        """
        logs = torch.cat([top.log_probs, top.log_tail[:, None]], dim=-1).float().cpu().numpy()
        if np.isnan(logs).any():
            raise RunError("The teacher's logits are not finite; try --dtype float32, or verify the checkpoint.")
        steps = np.rint(np.clip(-logs * STEPS, 0, LOWEST)).astype("<u2")
        ids = pack(top.ids.cpu().numpy().astype(np.uint32), self.id_bits)
        return np.concatenate([ids, steps.view(np.uint8)], axis=-1)

    def decode(self, records: Records) -> TopK:
        """The answer, as masses that sum to 1."""
        width = packed_bytes(self.k, self.id_bits)
        ids = unpack(records[:, :width], self.id_bits, self.k).astype(np.int64)
        logs = np.ascontiguousarray(records[:, width:]).view("<u2").astype(np.float32) / -STEPS
        logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
        words, rest = np.ascontiguousarray(logs[:, :-1]), np.ascontiguousarray(logs[:, -1])
        return TopK(torch.from_numpy(ids), torch.from_numpy(words), torch.from_numpy(rest), self.vocab)


def is_cache(directory: Path) -> bool:
    """Whether a directory is a cache, whole or damaged."""
    manifest = read_manifest(directory)
    return (directory / RECORDS).is_file() if manifest is None else manifest.get("stage") == STAGE


class TeacherCache:
    """A complete cache, open for positioned reads from any thread."""

    def __init__(self, directory: Path) -> None:
        """Open and check the directory.

        Raises:
            InputError: it is no cache, of another format, or its files are missing or too short.
        """
        manifest = read_manifest(directory)
        if manifest is None or manifest.get("stage") != STAGE:
            raise InputError(
                f"{directory} is not a cached teacher (no {MANIFEST} of one); write it with --cache-teacher."
            )
        content: dict[str, Any] = manifest["config"]
        if content.get("format") != FORMAT:
            raise InputError(f"{directory} has cache format {content.get('format')}; write it again with this version.")
        self.directory = directory
        self.content = Content.from_mapping(content)
        self.record = self.content.record
        self.inputs: dict[str, str] = manifest["inputs"]
        self.key: str = manifest["key"]
        try:
            index = load_file(directory / INDEX)
            self.rows, self.starts = index["rows"], index["starts"]
            size = (directory / RECORDS).stat().st_size
        except Exception:  # absent, cut short, or not safetensors: the library raises a kind of its own
            raise InputError(f"{directory} is damaged ({INDEX} or {RECORDS}); delete it and cache again.") from None
        needed = int(self.starts[-1]) * self.record.nbytes
        if size != needed:
            raise InputError(
                f"{directory / RECORDS} has {size} bytes instead of {needed}; delete {directory} and cache again."
            )
        self._order = np.argsort(self.rows)
        self._sorted = self.rows[self._order]
        self._file = os.open(directory / RECORDS, os.O_RDONLY)

    def missing(self, rows: npt.NDArray[np.int64]) -> int:
        """How many of these sequences it does not hold."""
        return int((~np.isin(rows, self._sorted)).sum())

    def records(self, row: int) -> Records:
        """The records of one sequence's targets.

        Raises:
            RunError: the file was cut short since it was opened.
        """
        place = int(self._order[np.searchsorted(self._sorted, row)])
        assert self.rows[place] == row, "the sequences of a run are checked before it begins"
        first, count = int(self.starts[place]), int(self.starts[place + 1] - self.starts[place])
        size = self.record.nbytes
        found = b""
        while len(found) < count * size:  # one read, but for the system's limit of 2 GiB
            more = os.pread(self._file, count * size - len(found), first * size + len(found))
            if not more:
                raise RunError(f"{self.directory / RECORDS} became shorter while it was read; cache the teacher again.")
            found = found + more if found else more
        return np.frombuffer(found, np.uint8).reshape(count, size)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)
