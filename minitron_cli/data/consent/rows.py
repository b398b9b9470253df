"""Rows of a part of a corpus in batches: URLs, token counts, crawl dates, and the rows as they came, for the filter."""

from __future__ import annotations

import csv
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minitron_cli.data.consent.corpus import Columns, Part, parse_jsonl
from minitron_cli.data.consent.pieces import delimiter
from minitron_cli.data.hub import open_hub, open_saved
from minitron_cli.data.readers import decompressed
from minitron_cli.errors import InputError, is_disk_full

BATCH_ROWS, BATCH_TEXTS, BATCH_BYTES = 8192, 1024, 8 << 20
"""Rows per batch without and with texts; bytes of JSON lines per batch."""

BYTES_PER_TOKEN = 4
"""Of the estimate where no column and no tokenizer counts: UTF-8 bytes of text that are taken as one token."""

Counter = Callable[[list[str]], list[int]]
"""Texts to numbers of tokens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows. `raw`: lines, CSV rows or an Arrow table, whatever the part's kind is."""

    first: int
    numbers: Sequence[int]
    urls: list[Any]
    tokens: list[int]
    dates: list[int | None] | None
    raw: Any


def read_part(part: Part, columns: Columns, counter: Counter | None, whole: bool) -> Iterator[Batch]:
    """The rows of a part; `whole`: with all columns, for the filter.

    Raises:
        InputError: broken or truncated data, naming the place.
    """
    if part.kind == "jsonl":
        return _json_batches(part, columns, counter)
    if part.kind == "csv":
        return _csv_batches(part, columns, counter)
    return _arrow_batches(part, columns, counter, whole)


def field(row: Any, name: str) -> Any:
    """A column of a row, or field b of its column a for `a.b`; None where it is absent."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    return field(value, inner) if isinstance(value, dict) else None


def _batch(
    part: Part, numbers: list[int], rows: list[Any], raw: Any, columns: Columns, counter: Counter | None
) -> Batch:
    """A batch out of rows that are mappings."""
    urls = [field(row, columns.url) for row in rows]
    if columns.tokens is not None:
        tokens = [_count(field(row, columns.tokens), part, n) for row, n in zip(rows, numbers, strict=True)]
    elif columns.tokens_from == "none" or columns.text is None:
        tokens = [0] * len(rows)
    else:
        name = columns.text
        texts = [_text(field(row, name), part, n, name) for row, n in zip(rows, numbers, strict=True)]
        tokens = counter(texts) if counter is not None else [estimate(len(_utf8(text))) for text in texts]
    dates = None if columns.date is None else [moment(field(row, columns.date)) for row in rows]
    return Batch(numbers[0], numbers, urls, tokens, dates, raw)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def estimate(octets: int) -> int:
    """Tokens of a text by its size alone."""
    return -(-octets // BYTES_PER_TOKEN)


def _text(value: Any, part: Part, row: int, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{part.where(row)}: column '{column}' holds {type(value).__name__}, not text.")
    return value


def _count(value: Any, part: Part, row: int) -> int:
    if value is None or value == "":
        return 0
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (0 <= number < 1e18):
        raise InputError(f"{part.where(row)}: {value!r} is not a number of tokens; choose with --tokens-column.")
    return round(number)


def moment(value: Any) -> int | None:
    """Unix time of an ISO date, a date object or seconds; None for anything else."""
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, datetime):
        return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    if isinstance(value, date):
        return int(datetime(value.year, value.month, value.day, 23, 59, 59, tzinfo=UTC).timestamp())
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


@lru_cache(maxsize=1 << 16)
def _parsed(text: str) -> int | None:
    """A day without a time stands for its end."""
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return moment(found.date() if len(text.strip()) <= 10 else found)


def _json_batches(part: Part, columns: Columns, counter: Counter | None) -> Iterator[Batch]:
    lines: list[bytes] = []
    numbers: list[int] = []
    size = 0
    for number, line in _lines(part):
        if line.isspace():
            continue
        lines.append(line)
        numbers.append(number)
        size += len(line)
        if len(lines) >= BATCH_ROWS or size >= BATCH_BYTES:
            rows = [parse_jsonl(line, part, n) for line, n in zip(lines, numbers, strict=True)]
            yield _batch(part, numbers, rows, lines, columns, counter)
            lines, numbers, size = [], [], 0
    if lines:
        rows = [parse_jsonl(line, part, n) for line, n in zip(lines, numbers, strict=True)]
        yield _batch(part, numbers, rows, lines, columns, counter)


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    path, number = Path(part.source), part.row - 1
    try:
        with path.open("rb") as raw, decompressed(path, raw) as stream:
            if part.start:
                stream.seek(part.start)
            place = part.start
            for number, line in enumerate(stream, part.row):
                yield number, line
                place += len(line)
                if part.stop and place >= part.stop:
                    return
    except (OSError, EOFError, zlib.error) as error:
        if is_disk_full(error):
            raise
        raise InputError(f"{path} cannot be read after line {number}: {error}.") from error


def _csv_batches(part: Part, columns: Columns, counter: Counter | None) -> Iterator[Batch]:
    path, number = Path(part.source), 0
    held: list[list[str]] = []
    names: list[str] = []

    def batch() -> Batch:
        rows = [dict(zip(names, row, strict=False)) for row in held]
        numbers = list(range(number - len(held) + 1, number + 1))
        return _batch(part, numbers, rows, held, columns, counter)

    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter(path.name))
            names = next(reader, [])
            for row in reader:
                if not row:
                    continue
                number += 1
                held.append(row)
                if len(held) >= BATCH_TEXTS:
                    yield batch()
                    held = []
            if held:
                yield batch()
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read after row {number}: {error}.") from error


def _arrow_batches(part: Part, columns: Columns, counter: Counter | None, whole: bool) -> Iterator[Batch]:
    wanted = columns.wanted()
    size = BATCH_TEXTS if whole or columns.text in wanted else BATCH_ROWS
    row = part.row
    try:
        for table in _tables(part, None if whole else wanted, size):
            if table.num_rows:
                yield _arrow_batch(part, row, table, columns, counter)
                row += table.num_rows
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # Arrow's and the streams' many kinds
        if is_disk_full(error):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{part.source} cannot be read after row {row - 1}: {first}") from error


def _arrow_batch(part: Part, row: int, table: pa.Table, columns: Columns, counter: Counter | None) -> Batch:
    numbers = range(row, row + table.num_rows)
    urls = column(table, columns.url).to_pylist()
    if columns.tokens is not None:
        counts = column(table, columns.tokens).to_pylist()
        tokens = [_count(value, part, number) for value, number in zip(counts, numbers, strict=True)]
    elif columns.tokens_from == "none" or columns.text is None:
        tokens = [0] * table.num_rows
    else:
        texts = column(table, columns.text)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise InputError(f"{part.where(row)}: column '{columns.text}' holds {texts.type}, not text.")
        if counter is not None:
            tokens = counter([text or "" for text in texts.to_pylist()])
        else:
            tokens = [estimate(size or 0) for size in pc.binary_length(texts).to_pylist()]
    dates = None if columns.date is None else [moment(value) for value in column(table, columns.date).to_pylist()]
    return Batch(row, numbers, urls, tokens, dates, table)


def column(table: pa.Table, name: str) -> Any:
    """A column, or a field of a struct column for `a.b`; nulls where it is absent."""
    if name in table.column_names:
        found = table[name]
        return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found
    outer, _, inner = name.partition(".")
    if outer in table.column_names and pa.types.is_struct(table.schema.field(outer).type):
        value = table[outer]
        for word in inner.split("."):
            if not (pa.types.is_struct(value.type) and value.type.get_field_index(word) >= 0):
                break
            value = pc.struct_field(value, word)
        else:
            return value
    raise InputError(f"column '{name}' is not there; choose among {', '.join(table.column_names)}.")


def _tables(part: Part, names: list[str] | None, size: int) -> Iterator[pa.Table]:
    """Arrow tables of at most `size` rows."""
    tops = None if names is None else list(dict.fromkeys(names))
    if part.kind == "parquet":
        with pq.ParquetFile(part.source) as file:
            if tops is not None:
                top_level = set(file.schema_arrow.names)
                tops = list(dict.fromkeys(n if n in top_level else n.partition(".")[0] for n in tops))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(size, row_groups=groups, columns=tops):
                yield pa.Table.from_batches([batch])
        return
    if part.kind == "saved":
        dataset = open_saved(Path(part.source), part.split).select(range(part.start, part.stop))
    else:
        dataset = open_hub(part.source, part.subset, part.split).shard(num_shards=part.stop, index=part.start)
    present = dataset.column_names
    if tops is not None and present is not None:
        dataset = dataset.select_columns(list(dict.fromkeys(n if n in present else n.partition(".")[0] for n in tops)))
    if dataset.features is not None:
        yield from dataset.with_format("arrow").iter(batch_size=size)
    else:  # a stream of plain rows: its batches need not agree on types
        yield from (pa.table(batch) for batch in dataset.iter(batch_size=size))
