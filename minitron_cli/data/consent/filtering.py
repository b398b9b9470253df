"""What the filter keeps, written in the format the rows came in."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_cli.data.consent.corpus import Part
from minitron_cli.data.consent.pieces import csv_header, delimiter
from minitron_cli.data.consent.policy import BAD_URL, DISALLOWED, UNKNOWN
from minitron_cli.data.consent.rows import Batch

GROUP_BYTES = 64 << 20
"""Arrow bytes of one row group of a filtered Parquet file."""


def keeps(status: int, unknown: str) -> bool:
    """Whether a document stays. What is not known, a malformed URL included, follows `unknown`: "keep" or "drop"."""
    return unknown == "keep" if status in (UNKNOWN, BAD_URL) else status != DISALLOWED


class Sink(Protocol):
    """A file of kept rows."""

    def write(self, batch: Batch, kept: Sequence[int]) -> None:
        """Add the rows of a batch at the places `kept`."""

    def close(self) -> None:
        """Finish the file."""


class Filtered:
    """The filtered copy of one part; a context manager."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.path = folder / part.name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kinds: dict[str, Any] = {"jsonl": _Lines, "csv": _Rows}
        self._sink: Sink = kinds.get(part.kind, _Tables)(part, self.path)

    def write(self, batch: Batch, kept: Sequence[int]) -> None:
        """Add the rows of a batch at the places `kept`."""
        self._sink.write(batch, kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sink.close()


class _Lines:
    """JSON lines, byte for byte as they were; compressed as the input was."""

    def __init__(self, part: Part, path: Path) -> None:
        self._raw = path.open("wb")
        self._stream: Any = self._raw
        if path.suffix == ".gz":  # without name and time, so that equal content gives equal bytes
            self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0, compresslevel=6)
        elif path.suffix == ".zst":
            self._stream = pa.CompressedOutputStream(self._raw, "zstd")

    def write(self, batch: Batch, kept: Sequence[int]) -> None:
        lines = [batch.raw[place] for place in kept]
        self._stream.write(b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines))

    def close(self) -> None:
        self._stream.close()
        self._raw.close()


class _Rows:
    """CSV with the header of the input."""

    def __init__(self, part: Part, path: Path) -> None:
        self._stream: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._stream, delimiter=delimiter(path.name), lineterminator="\n")
        self._writer.writerow(csv_header(Path(part.source)) or [])

    def write(self, batch: Batch, kept: Sequence[int]) -> None:
        self._writer.writerows(batch.raw[place] for place in kept)

    def close(self) -> None:
        self._stream.close()


class _Tables:
    """Parquet with the schema of the input; where a stream has none, that of the first rows."""

    def __init__(self, part: Part, path: Path) -> None:
        self._path, self._held, self._bytes = path, list[pa.Table](), 0
        self._writer: pq.ParquetWriter | None = None
        if part.kind == "parquet":
            self._writer = pq.ParquetWriter(path, pq.read_schema(part.source), compression="zstd")

    def write(self, batch: Batch, kept: Sequence[int]) -> None:
        self._held.append(batch.raw.take(pa.array(kept, pa.int64())))
        self._bytes += self._held[-1].nbytes
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held, promote_options="permissive")
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, _stated(table.schema), compression="zstd")
            self._writer.write_table(_aligned(table, self._writer.schema))
        self._held, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()


def _stated(schema: pa.Schema) -> pa.Schema:
    """Columns that were null so far are taken for text."""
    return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema])


def _aligned(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of a schema, null where it lacks them."""
    present = set(table.column_names)
    columns = [table[f.name].cast(f.type) if f.name in present else pa.nulls(len(table), f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)
