"""Files as streams: blocks of text, paragraphs, rows of JSON lines and Parquet. Memory is one block or one batch."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minitron_cli.errors import InputError

BLOCK_BYTES = 2 << 20
"""About the most a document of a text file may hold: tokenising takes 100 times its memory. Longer ones are cut."""

PARQUET_ROWS = 256
"""Rows decoded at a time."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".json.zst")
PARQUET_SUFFIXES = (".parquet",)

Row = tuple[str, dict[str, Any], int]
"""Place (file and line or row), columns, bytes of the file used up by it."""


def is_binary(path: Path) -> bool:
    """Whether the start of the file holds a NUL byte, which no UTF-8 text does in practice."""
    with path.open("rb") as stream:
        return b"\0" in stream.read(8192)


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks of about 2 MiB that end after a line end (or mid-line, if a line is longer).

    A byte order mark at the start is dropped; line ends stay as they are.

    Raises:
        InputError: bytes that are not UTF-8, with their offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            if len(block) == BLOCK_BYTES:
                block += stream.readline(BLOCK_BYTES)
            text = _decode(decoder, block, offset, path)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
    _decode(decoder, b"", offset, path, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, path: Path, *, final: bool = False) -> str:
    held_back = len(decoder.getstate()[0])  # the first bytes of a character that the last block ended in
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = offset - held_back + error.start
        raise InputError(
            f"{path} is not UTF-8 text: byte {place} cannot be decoded; convert it (iconv -t utf-8) or leave it out."
        ) from None


def text_lines(path: Path) -> Iterator[str]:
    """Lines without their end; one that straddles two blocks is given in two parts only if it is over 2 MiB."""
    for block in text_blocks(path):
        lines = block.split("\n")
        if not lines[-1]:
            lines.pop()
        yield from lines


def paragraphs(path: Path) -> Iterator[str]:
    """Runs of lines between blank lines, joined by line ends; one over 2 MiB is cut."""
    held: list[str] = []
    size = 0
    for line in text_lines(path):
        blank = not line.strip()
        if held and (blank or size > BLOCK_BYTES):
            yield "\n".join(held)
            held, size = [], 0
        if not blank:
            held.append(line)
            size += len(line) + 1
    if held:
        yield "\n".join(held)


def json_rows(path: Path) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped. Reads .gz and .zst.

    Raises:
        InputError: a line that is not UTF-8 or not a JSON object, or damaged compression; with file and line.
    """
    number = used = 0
    try:
        with path.open("rb") as raw, decompressed(path, raw) as stream:
            for number, line in enumerate(stream, 1):
                if line.isspace():
                    continue
                where = f"{path}:{number}"
                row = parse_row(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where, path)
                here = raw.tell()  # of the compressed file, where it is one; the only size known beforehand
                yield where, row, here - used
                used = here
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read after line {number}: {error}.") from error


def decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The stream behind .gz and .zst, by the name; others as they are."""
    if path.suffix == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def parse_row(line: bytes, where: str, path: Path) -> dict[str, Any]:
    """One line as a JSON object; `where` names it in errors.

    Raises:
        InputError: it is none.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text at byte {error.start} of the line.") from None
    except ValueError as error:
        hint = (
            " (one JSON object per line is expected; `jq -c '.[]'` converts an array)" if where.endswith(":1") else ""
        )
        raise InputError(f"{where}: broken JSON: {error}{hint}.") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: holds a JSON {type(row).__name__}, not an object with columns.")
    return row


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns, from the footer alone.

    Raises:
        InputError: the file is not Parquet or is truncated.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def parquet_rows(path: Path, column: str) -> Iterator[Row]:
    """Rows of one column, read in small batches.

    Raises:
        InputError: damaged data.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            read = path.stat().st_size // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path} row {number}", {column: value}, read
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read after row {number}: {str(error).splitlines()[0]}") from error
