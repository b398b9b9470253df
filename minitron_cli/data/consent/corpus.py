"""A corpus as parts that processes read on their own, each in batches of rows with their URLs and token counts.

The parts depend on the files alone, never on the number of processes, so neither does anything that is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.hub import is_local
from minitron_cli.data.consent.pieces import CSV_SUFFIXES, about_rows, divide
from minitron_cli.data.hub import is_saved_dataset, open_hub, open_saved
from minitron_cli.data.readers import JSON_SUFFIXES, parse_row
from minitron_cli.errors import InputError
from minitron_cli.manifest import digest, fingerprint

SUFFIXES = (*JSON_SUFFIXES, ".parquet", *CSV_SUFFIXES)
_HUB_ROWS = 1 << 18


@dataclass(frozen=True)
class Columns:
    """Names of the columns wanted. `tokens_from`: "column", "tokenizer", "bytes", or "none" where nothing tells."""

    url: str
    text: str | None
    tokens: str | None
    date: str | None
    tokens_from: str

    def wanted(self) -> list[str]:
        """The columns that judging needs."""
        text = self.text if self.tokens_from in ("tokenizer", "bytes") else None
        return list(dict.fromkeys(name for name in (self.url, text, self.tokens, self.date) if name))


@dataclass(frozen=True)
class Part:
    """A file, or a piece of one: bytes [start, stop) of JSON lines, row groups of Parquet, rows of a saved data set.

    `row`: number of the first row in its file, from 1. `name`: of the file to write for it, without folder.
    """

    number: int
    kind: str
    source: str
    name: str
    start: int = 0
    stop: int = 0
    row: int = 1
    subset: str | None = None
    split: str = "train"

    def where(self, row: int) -> str:
        """A row for error messages, as the readers of text name it."""
        return f"{self.source}:{row}" if self.kind == "jsonl" else f"{self.source} row {row}"


@dataclass(frozen=True)
class Corpus:
    """An opened source: its parts, columns and identity. `size`: bytes. `rows`: about how many, 0 where unknown."""

    name: str
    parts: tuple[Part, ...]
    columns: Columns
    identity: str
    size: int
    rows: int


def open_corpus(
    name: str, *, url: str, text: str | None = None, tokens: str | None = None, date: str | None = None,
    tokenizer: bool = False, subset: str | None = None, split: str = "train",
) -> Corpus:  # fmt: skip
    """Find the parts of a corpus and check that every file has the columns; `text` may be absent unless a tokenizer
    is to count it.

    Raises:
        InputError: nothing there, not readable, or a column is missing.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if is_local(name) or name.endswith(SUFFIXES) or name.count("/") > 1:
            raise InputError(f"{name} does not exist.")
        opened = _hub(name, subset, split)
    elif path.is_dir() and is_saved_dataset(path):
        opened = _saved(path, split)
    else:
        opened = _files(name, path)
    parts, present, identity, size, rows = opened
    return Corpus(name, tuple(parts), _columns(present, url, text, tokens, date, tokenizer), identity, size, rows)


Opened = tuple[list[Part], list[tuple[str, list[str]]], str, int, int]
"""Parts; (place, columns) to check; identity; bytes; rows."""


def _columns(
    present: list[tuple[str, list[str]]], url: str, text: str | None, tokens: str | None, date: str | None,
    tokenizer: bool,
) -> Columns:  # fmt: skip
    has_text = text is not None and all(_has(names, text) for _, names in present)
    needed = {url: "--url-column", tokens: "--tokens-column", date: "--date-column"}
    if tokenizer and tokens is None:
        needed[text] = "--text-column"
    for column, option in needed.items():
        for place, names in present:
            if column is not None and not _has(names, column):
                shown = ", ".join(sorted(names)) or "no columns"
                raise InputError(f"{place} has no column '{column}', only {shown}; choose with {option}.")
    source = "column" if tokens else "tokenizer" if tokenizer else "bytes" if has_text else "none"
    return Columns(url, text if has_text else None, tokens, date, source)


def _has(names: list[str], column: str) -> bool:
    """Whether a column, or field `b` of a column `a` for `a.b`, may be there."""
    return column in names or ("." in column and column.partition(".")[0] in names)


def _files(name: str, path: Path) -> Opened:
    files = [path]
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES))
        files = [item for item in files if not any(word.startswith(".") for word in item.relative_to(path).parts)]
        if not files:
            raise InputError(f"{name} holds no JSONL, Parquet or CSV file.")
    parts: list[Part] = []
    present: list[tuple[str, list[str]]] = []
    for file in files:
        if not file.name.endswith((*SUFFIXES, ".json")):  # a .json in a directory is mostly about it, not data
            raise InputError(f"{file} is neither JSONL, Parquet nor CSV by its suffix; a corpus to audit has columns.")
        inside = file.relative_to(path).as_posix() if path.is_dir() else file.name
        pieces, names = divide(file)
        if names is not None:
            present.append((str(file), names))
        stem, dot, suffix = inside.partition(".") if "/" not in inside else _split_name(inside)
        for number, (kind, start, stop, row) in enumerate(pieces):
            piece = f"{stem}-{number + 1:05d}-of-{len(pieces):05d}{dot}{suffix}" if len(pieces) > 1 else inside
            parts.append(Part(len(parts), kind, str(file), piece, start, stop, row))
    if not present:
        raise InputError(f"{name} holds no documents.")
    size = sum(file.stat().st_size for file in files)
    return parts, present, fingerprint(path), size, sum(about_rows(file) for file in files)


def _split_name(inside: str) -> tuple[str, str, str]:
    folder, _, file = inside.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}/{stem}", dot, suffix


def _hub(name: str, subset: str | None, split: str) -> Opened:
    dataset = open_hub(name, subset, split)
    count = int(getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", None) or 1)
    names = dataset.column_names or list(next(iter(dataset), {}))
    parts = [
        Part(number, "hub", name, f"part-{number + 1:05d}-of-{count:05d}.parquet", number, count, 1, subset, split)
        for number in range(count)
    ]
    return parts, [(name, list(names))], digest(["hub", name, subset, split]), 0, 0


def _saved(path: Path, split: str) -> Opened:
    dataset = open_saved(path, split)
    starts = range(0, max(len(dataset), 1), _HUB_ROWS)
    parts = [
        Part(
            number, "saved", str(path), f"part-{number + 1:05d}-of-{len(starts):05d}.parquet", start,
            min(start + _HUB_ROWS, len(dataset)), start + 1, None, split,
        )
        for number, start in enumerate(starts)
    ]  # fmt: skip
    identity = digest([fingerprint(path), split])
    return parts, [(str(path), list(dataset.column_names))], identity, 0, len(dataset)


def parse_jsonl(line: bytes, part: Part, row: int) -> dict[str, Any]:
    """One line of a JSONL part."""
    return parse_row(line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line, part.where(row), Path(part.source))
