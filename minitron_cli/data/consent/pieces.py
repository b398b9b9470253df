"""How files of a corpus are divided into pieces that processes read on their own; nothing here knows of URLs.

The pieces depend on the files alone, never on the number of processes, so neither does anything that is written.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_cli.data.readers import decompressed, json_rows, parquet_columns
from minitron_cli.errors import InputError

PART_BYTES = 128 << 20
"""Larger files of a kind that can be divided are, into parts of about this size."""

CSV_SUFFIXES = (".csv", ".tsv")

csv.field_size_limit(min(sys.maxsize, 1 << 40))

Piece = tuple[str, int, int, int]
"""Kind, start, stop, number of the first row."""


def divide(file: Path) -> tuple[list[Piece], list[str] | None]:
    """How a file is divided, and its columns (None where it has no rows)."""
    if file.name.endswith(".parquet"):
        names = parquet_columns(file)
        return _row_groups(file), names
    if file.name.endswith(CSV_SUFFIXES):
        return [("csv", 0, 0, 1)], csv_header(file)
    first = next(json_rows(file), None)
    whole = file.name.endswith((".gz", ".zst")) or file.stat().st_size <= PART_BYTES
    return [("jsonl", 0, 0, 1)] if whole else _line_ranges(file), None if first is None else list(first[1])


def csv_header(file: Path) -> list[str] | None:
    """The first row of a CSV file; None for an empty file.

    Raises:
        InputError: it is not UTF-8 text.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream, delimiter=delimiter(file.name)), None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is not a CSV file in UTF-8: {error}.") from None


def delimiter(name: str) -> str:
    """Tab for .tsv, else a comma."""
    return "\t" if name.endswith(".tsv") else ","


def _row_groups(file: Path) -> list[Piece]:
    """Runs of row groups of about PART_BYTES (as stored)."""
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    pieces: list[Piece] = []
    begin, size, row, first = 0, 0, 1, 1
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        size += sum(found.column(index).total_compressed_size for index in range(found.num_columns))
        row += found.num_rows
        if size >= PART_BYTES or group + 1 == metadata.num_row_groups:
            pieces.append(("parquet", begin, group + 1, first))
            begin, size, first = group + 1, 0, row
    return pieces or [("parquet", 0, 0, 1)]


def _line_ranges(file: Path) -> list[Piece]:
    """Byte ranges of about PART_BYTES that end after a line end, with the number of their first line."""
    pieces: list[Piece] = []
    size = file.stat().st_size
    start, line = 0, 1
    with file.open("rb") as stream:
        while start < size:
            stream.seek(min(start + PART_BYTES, size))
            stream.readline()
            stop = stream.tell()
            pieces.append(("jsonl", start, stop, line))
            if stop < size:
                stream.seek(start)
                line += sum(block.count(b"\n") for block in _blocks(stream, stop - start))
            start = stop
    return pieces


def about_rows(file: Path) -> int:
    """Rows of a file: exact for Parquet, else by the size of the first ones."""
    if file.name.endswith(".parquet"):
        return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as raw, decompressed(file, raw) as stream:
        lines = sum(1 for _ in itertools.islice(stream, 2000))
        return round(lines * file.stat().st_size / max(min(raw.tell(), file.stat().st_size), 1))


def _blocks(stream: Any, length: int) -> Iterator[bytes]:
    while length > 0 and (block := stream.read(min(length, 1 << 20))):
        length -= len(block)
        yield block
