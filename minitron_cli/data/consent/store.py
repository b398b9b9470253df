"""The store of policies: a directory of Parquet files, one row per capture of a robots.txt (or tdmrep.json).

Files are only ever added, each by a rename, so a killed writer leaves a valid store. Rows of one file are sorted by
authority. An authority may have any number of captures; of two with the same date, the one added last counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_cli.data.robots import MAX_BYTES
from minitron_cli.errors import InputError, OutputError
from minitron_cli.manifest import sync_directory

SCHEMA = pa.schema(
    [
        ("authority", pa.string()),
        ("kind", pa.string()),
        ("fetched_at", pa.timestamp("ms", tz="UTC")),
        ("status", pa.int16()),
        ("body", pa.binary()),
        ("headers", pa.string()),
        ("note", pa.string()),
    ]
)
"""`status` is that of HTTP, 0 where no answer came; `headers` is a JSON object; `note` says what failed, or where a
redirect ended."""

ROBOTS, TDMREP = "robots", "tdmrep"
KINDS = (ROBOTS, TDMREP)
BODY_LIMIT = MAX_BYTES + 1
"""Bytes of a body that are kept: one more than the parser reads, so that it knows of the cut."""

SIGNAL_HEADERS = ("content-usage", "link", "tdm-reservation", "x-robots-tag")
KEPT_HEADERS = ("content-type", "last-modified", *SIGNAL_HEADERS)
"""Headers that may hold a signal, and all that fetching keeps."""

FLUSH_ROWS, FLUSH_BYTES = 5000, 32 << 20
ROW_GROUP = 1000
PATTERN = "captures-*.parquet"
LOCK = "store.lock"


@dataclass(frozen=True)
class Capture:
    """What one authority answered at one time (`fetched_at`: Unix time, seconds)."""

    authority: str
    fetched_at: int
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = ROBOTS
    note: str = ""


def store_files(path: Path) -> list[Path]:
    """The files of a store, oldest first.

    Raises:
        InputError: there is no store.
    """
    files = sorted(path.glob(PATTERN)) if path.is_dir() else []
    if not files:
        what = "does not exist" if not path.exists() else "holds no captures"
        raise InputError(
            f"The robots store {path} {what}; fill one with `minitron data robots fetch --from CORPUS --out {path}` or "
            "`minitron data robots import`."
        )
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is damaged ({str(error).splitlines()[0]}); remove it and fetch again.") from None
        if not schema.equals(SCHEMA):
            raise InputError(f"{file} is not a file of a robots store; move it away.")
    return files


def stored_bytes(files: Iterable[Path]) -> int:
    """Size of the captures when not compressed, as a look-up holds them."""
    footers = (pq.read_metadata(file) for file in files)
    return sum(footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups))


def read_index(path: Path) -> pa.Table:
    """Every capture without body and headers: authority, kind, fetched_at, status, in the order of the store."""
    columns = ["authority", "kind", "fetched_at", "status"]
    return pa.concat_tables([pq.read_table(file, columns=columns) for file in store_files(path)])


def read_captures(path: Path) -> Iterator[Capture]:
    """Every capture, one row group in memory at a time."""
    for file in store_files(path):
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(ROW_GROUP):
                for row in batch.to_pylist():
                    row["fetched_at"] = int(row["fetched_at"].timestamp())
                    yield Capture(**{**row, "headers": json.loads(row["headers"])})


class StoreWriter:
    """Adds captures; what was flushed stays, whatever happens then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.added = 0
        self._rows: list[Capture] = []
        self._bytes = 0
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Make the directory and lock it.

        Raises:
            OutputError: the path holds something else, or another process writes it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"--out {self.path} is a file; a store is a directory.")
        if self.path.is_dir():
            strange = [item.name for item in self.path.iterdir() if not _ours(item.name)]
            if strange:
                raise OutputError(f"--out {self.path} holds files that are no store ({strange[0]}); choose another.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"Another process is writing {self.path}; wait for it.") from None
        except OSError:
            pass  # a file system without locks
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        return self

    def add(self, capture: Capture) -> None:
        """Queue one capture; written when enough are waiting."""
        self._rows.append(capture)
        self._bytes += len(capture.body)
        if len(self._rows) >= FLUSH_ROWS or self._bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one more file."""
        if not self._rows:
            return
        rows = sorted(self._rows, key=lambda row: (row.authority, row.kind, row.fetched_at))
        columns = [
            pa.array([row.authority for row in rows], pa.string()),
            pa.array([row.kind for row in rows], pa.string()),
            pa.array([1000 * row.fetched_at for row in rows], SCHEMA.field("fetched_at").type),
            pa.array([row.status for row in rows], pa.int16()),
            pa.array([row.body[:BODY_LIMIT] for row in rows], pa.binary()),
            pa.array([json.dumps(dict(row.headers), sort_keys=True) for row in rows], pa.string()),
            pa.array([row.note for row in rows], pa.string()),
        ]
        numbers = [int(item.stem.rpartition("-")[2]) for item in self.path.glob(PATTERN)]
        final = self.path / f"captures-{max(numbers, default=0) + 1:06d}.parquet"
        temporary = final.with_name(final.name + ".tmp")
        pq.write_table(
            pa.Table.from_arrays(columns, schema=SCHEMA), temporary, compression="zstd", row_group_size=ROW_GROUP
        )
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
        sync_directory(self.path)
        self.added += len(rows)
        self._rows, self._bytes = [], 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.flush()  # also after Ctrl-C: these captures are whole
        finally:
            if self._lock is not None:
                os.close(self._lock)


def _ours(name: str) -> bool:
    return name == LOCK or (name.startswith("captures-") and name.endswith((".parquet", ".parquet.tmp")))
