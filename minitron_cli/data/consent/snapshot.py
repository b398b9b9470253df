"""A store laid out for look-ups: sorted by authority in memory-mapped files that all processes share.

Look-ups are a binary search and touch only the pages they need, so memory does not grow with the store; equal bodies
are kept once.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minitron_cli.data.consent.store import KINDS, read_index, store_files

INDEX, BODIES = "state.policies.arrow", "state.bodies"
"""Names that a stage output removes when it is complete."""


def build_snapshot(store: Path, directory: Path) -> None:
    """Write the sorted look-up files of a store into `directory`. Memory: the index of the store, without its bodies.

    Raises:
        InputError: there is no store, or it is damaged.
    """
    table = read_index(store).combine_chunks()
    table = table.append_column("position", pa.array(np.arange(len(table), dtype=np.int64)))
    # Later additions of the same date come later, so that the last of them is found first from the end.
    keys = [(name, "ascending") for name in ("authority", "kind", "fetched_at", "position")]
    order = pc.sort_indices(table, sort_keys=keys)
    offsets, lengths, headers = _copy_bodies(store, directory / BODIES, len(table))
    table = table.append_column("offset", pa.array(offsets)).append_column("length", pa.array(lengths))
    table = table.append_column("headers", pa.array(headers, pa.large_string())).drop_columns(["position"])
    table = table.take(order)
    table = table.set_column(0, "authority", table["authority"].cast(pa.large_string()))
    table = table.set_column(2, "fetched_at", pc.divide(table["fetched_at"].cast(pa.int64()), 1000))
    table = table.set_column(1, "kind", pc.index_in(table["kind"], value_set=pa.array(KINDS)).cast(pa.int8()))
    batch = table.combine_chunks().to_batches(max_chunksize=max(len(table), 1))
    with pa.OSFile(str(directory / INDEX), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for part in batch:
            writer.write_batch(part)


def _copy_bodies(store: Path, out: Path, rows: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All bodies behind each other, equal ones once: offset and length of each row's, and its headers."""
    offsets, lengths = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    headers: list[str] = []
    seen: dict[bytes, int] = {}
    place = row = 0
    with out.open("wb") as sink:
        for file in store_files(store):
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(columns=["body", "headers"]):
                    headers += batch["headers"].to_pylist()
                    for body in batch["body"]:
                        data = body.as_buffer()
                        key = hashlib.blake2b(data, digest_size=16).digest() if len(data) else b""
                        if key not in seen:
                            seen[key] = place
                            place += sink.write(data)
                        offsets[row], lengths[row] = seen[key], len(data)
                        row += 1
        sink.write(b"\0")  # an empty file cannot be mapped
    return offsets, lengths, headers


@dataclass(frozen=True, slots=True)
class Row:
    """One capture of an authority."""

    number: int
    fetched_at: int
    status: int


class Snapshot:
    """Look-ups by authority. Rows of one authority and kind are in the order of their dates."""

    def __init__(self, directory: Path) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(directory / INDEX))).get_batch(0)
        self._authorities = batch["authority"]
        self._headers = batch["headers"]
        names = ("kind", "fetched_at", "status", "offset", "length")
        self._kind, self._at, self._status, self._offset, self._length = (batch[name].to_numpy() for name in names)
        self._size: int = batch.num_rows
        self._kinds = set(np.unique(self._kind).tolist())
        with (directory / BODIES).open("rb") as stream:
            self._bodies = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return self._size

    def rows(self, authority: str, kind: int = 0) -> list[Row]:
        """Captures of one authority, oldest first; `kind` is a place in `KINDS`."""
        found: list[Row] = []
        number = self._first(authority) if kind in self._kinds else self._size
        while number < self._size and self._authorities[number].as_py() == authority:
            if self._kind[number] == kind:
                found.append(Row(number, int(self._at[number]), int(self._status[number])))
            number += 1
        return found

    def _first(self, authority: str) -> int:
        low, high = 0, self._size
        while low < high:
            middle = (low + high) // 2
            # Arrow sorts strings by their UTF-8 bytes; authorities are ASCII, where Python's order is the same.
            if self._authorities[middle].as_py() < authority:
                low = middle + 1
            else:
                high = middle
        return low

    def body(self, number: int) -> bytes:
        """The body of a capture."""
        start = int(self._offset[number])
        return self._bodies[start : start + int(self._length[number])]

    def body_key(self, number: int) -> tuple[int, int]:
        """Equal for captures with equal bodies."""
        return int(self._offset[number]), int(self._length[number])

    def headers(self, number: int) -> Mapping[str, str]:
        """The headers of a capture."""
        value: dict[str, str] = json.loads(self._headers[number].as_py())
        return value

    def header_key(self, number: int) -> str:
        """Equal for captures with equal headers."""
        return str(self._headers[number].as_py())

    def span(self) -> tuple[str, str]:
        """Days of the first and the last capture."""
        first, last = (datetime.fromtimestamp(int(at), UTC) for at in (self._at.min(), self._at.max()))
        return first.date().isoformat(), last.date().isoformat()

    def months(self) -> list[str]:
        """The months in which captures were made, as `2025-06`, in order."""
        stamps = np.unique(self._at.astype("datetime64[s]").astype("datetime64[M]"))
        return [str(stamp) for stamp in stamps]


def month_end(month: str) -> int:
    """Unix time of the last second of a month given as `2025-06`."""
    year, number = map(int, month.split("-"))
    following = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)
    return int(following.timestamp()) - 1


def latest(rows: list[Row], at: int | None) -> Row | None:
    """The last capture at or before `at` (Unix time; None: the last of all)."""
    for row in reversed(rows):
        if at is None or row.fetched_at <= at:
            return row
    return None
