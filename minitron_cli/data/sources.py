"""What the SOURCE words of the command line mean, checked before any work; each becomes a stream of documents."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from minitron_cli.checkpoint.hub import is_local
from minitron_cli.config.data import DataConfig
from minitron_cli.data import stdlib
from minitron_cli.data.documents import Column, Document, SplitRule, missing_column
from minitron_cli.data.hub import hub_rows, is_saved_dataset, saved_rows
from minitron_cli.data.readers import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    Row,
    is_binary,
    json_rows,
    paragraphs,
    parquet_columns,
    parquet_rows,
    text_blocks,
    text_lines,
)
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.manifest import digest, fingerprint
from minitron_cli.runtime.progress import say

ROW_SUFFIXES = JSON_SUFFIXES + PARQUET_SUFFIXES

_FILE_SUFFIXES = (*ROW_SUFFIXES, ".json", ".txt", ".text", ".md", ".py", ".csv", ".gz", ".zst")
"""Names that end so are files the user mistyped, never Hub ids."""


@dataclass(frozen=True)
class Source:
    """One SOURCE, opened and checked.

    `weight`: its part of the mix, or None. `identity`: changes when the content does. `size`: bytes of input, 0 where
    unknown. `documents`: starts a fresh pass. `rule`: the split, whose `full` the reader may set (see SplitRule).
    `shards`: the same documents in parts (files, shards of a Hub data set) that can be read in any order.
    """

    name: str
    kind: str
    weight: float | None
    identity: str
    size: int
    rule: SplitRule
    documents: Callable[[], Iterator[Document]]
    shards: tuple[Callable[[], Iterator[Document]], ...]


def open_sources(config: DataConfig) -> list[Source]:
    """Every source of the configuration, in its order.

    Raises:
        ConfigError: weights that are not positive, or only on some sources; chat messages wanted from plain text.
        InputError: a missing or unreadable path, a missing column, an unusable file, a Hub that does not answer.
    """
    words = [parse_weight(word) for word in config.sources]
    weighted = [name for name, weight in words if weight is not None]
    if weighted and len(weighted) < len(words):
        bare = next(name for name, weight in words if weight is None)
        raise ConfigError(f"{bare} has no weight but {weighted[0]} has; give every SOURCE one (SOURCE@0.3), or none.")
    return [_open(name, weight, config) for name, weight in words]


def parse_weight(word: str) -> tuple[str, float | None]:
    """`SOURCE@0.3` as (SOURCE, 0.3); a word without a number after its last `@`, or that exists, has no weight.

    Raises:
        ConfigError: the number is not positive and finite.
    """
    name, at, number = word.rpartition("@")
    if not at or not name or Path(word).expanduser().exists():
        return word, None
    try:
        weight = float(number)
    except ValueError:
        return word, None
    if not (weight > 0 and math.isfinite(weight)):
        raise ConfigError(f"{word}: the weight after @ must be a positive number.")
    return name, weight


def _open(name: str, weight: float | None, config: DataConfig) -> Source:
    rule = SplitRule(round(1 / config.validation) if config.validation else 0)
    column = Column(config.messages or config.text_column, config.messages is not None)
    path = Path(name).expanduser()
    if name == stdlib.NAME:
        files = stdlib.stdlib_files()
        identity = digest([list(sys.version_info[:3]), [[key, file.stat().st_size] for key, file in files]])
        return _text_source(name, stdlib.NAME, weight, identity, files, rule, "file", config)
    if not path.exists():
        if is_local(name) or name.endswith(_FILE_SUFFIXES) or name.count("/") > 1:
            raise InputError(f"{name} does not exist; give a file, a directory, a Hub data set or python-stdlib.")
        rows = hub_rows(name, config.subset, config.hub_split, column.name)
        return _row_source(name, "hub", weight, digest(["hub", name]), 0, rows, column, rule)
    if path.is_dir():
        return _open_directory(name, path, weight, rule, column, config)
    _require_readable(path)
    if path.name.endswith((*ROW_SUFFIXES, ".json")):
        return _row_files(name, [path], weight, fingerprint(path), rule, column)
    if is_binary(path):
        raise InputError(f"{path} is a binary file; text must be UTF-8 (or JSONL, Parquet by its suffix).")
    mode = config.split_documents
    if mode == "auto":
        # A .txt file that somebody names is nearly always a whole corpus; code and Markdown are one document.
        mode = "blank-line" if path.suffix in (".txt", "") else "file"
    return _text_source(name, "text", weight, fingerprint(path), [(path.name, path)], rule, mode, config)


def _open_directory(
    name: str, path: Path, weight: float | None, rule: SplitRule, column: Column, config: DataConfig
) -> Source:
    """Rows if any Parquet or JSON-lines file is below (README and licence beside them are not read), else text."""
    if config.out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"--out {config.out} lies inside the source {name}; choose a directory elsewhere.")
    if (path / "dataset.json").exists() and (path / "train.tokens").exists():
        raise InputError(
            f"{name} is prepared already (it holds tokens, not text); give it to the next stage as --data."
        )
    if is_saved_dataset(path):
        rows = saved_rows(path, config.hub_split, column.name)
        return _row_source(name, "saved data set", weight, fingerprint(path), 0, [rows], column, rule)
    files = _visible_files(path)
    if not files:
        raise InputError(f"{name} is a directory without files.")
    for file in files:
        _require_readable(file)
    row_files = [file for file in files if file.name.endswith(ROW_SUFFIXES)]
    if row_files:
        if len(files) > len(row_files):
            say(f"{name}: reading {len(row_files)} data files; {len(files) - len(row_files)} other files are left out.")
        return _row_files(name, row_files, weight, fingerprint(path), rule, column)
    texts = [file for file in files if not is_binary(file)]
    if not texts:
        raise InputError(f"{name} holds no text: its {len(files)} files are binary.")
    if len(texts) < len(files):
        say(f"{name}: reading {len(texts)} text files; {len(files) - len(texts)} binary files are left out.")
    keyed = [(file.relative_to(path).as_posix(), file) for file in texts]
    mode = "file" if config.split_documents == "auto" else config.split_documents
    return _text_source(name, "text", weight, fingerprint(path), keyed, rule, mode, config)


def _visible_files(path: Path) -> list[Path]:
    """Files below `path`, sorted by relative path; names that start with a dot (.git, .DS_Store) are not looked at."""
    found = []
    for folder, directories, names in os.walk(path):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(path).as_posix())


def _require_readable(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is neither a file nor a directory.")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: permission denied.")


def _text_source(
    name: str, kind: str, weight: float | None, identity: str, files: list[tuple[str, Path]], rule: SplitRule,
    mode: str, config: DataConfig,
) -> Source:  # fmt: skip
    if config.messages is not None:
        raise ConfigError(f"--messages needs rows with columns (JSONL, Parquet, Hub), and {name} is plain text.")
    size = sum(file.stat().st_size for _, file in files)

    documents = partial(file_documents, files, mode, rule, config.seed)
    shards = tuple(partial(file_documents, [item], mode, rule, config.seed) for item in files)
    return Source(name, kind, weight, digest([identity, mode]), size, rule, documents, shards)


def file_documents(files: list[tuple[str, Path]], mode: str, rule: SplitRule, seed: int) -> Iterator[Document]:
    """Documents of text files, in an order that depends on the keys and the seed alone.

    Whole files: validation files first, so that a run that stops early has them; then the train files. Their text
    does not decide the split, their relative path does. Lines and paragraphs decide by their text, file after file.
    """
    order = sorted(
        files, key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode("utf-8", "surrogateescape")).hexdigest()
    )
    if mode == "file":
        chosen = {key for key, _ in order if rule.is_validation(key)}
        order.sort(key=lambda item: item[0] not in chosen)  # stable: the shuffle holds within each side
        for key, path in order:
            if key in chosen and rule.full:
                continue
            for text in text_blocks(path):
                if text.strip():
                    yield Document(text, key in chosen, len(text), str(path))
        return
    pieces = text_lines if mode == "line" else paragraphs
    for _, path in order:
        for text in pieces(path):
            if text.strip():
                yield Document(text, rule.is_validation(text), len(text) + 1, str(path))


def _row_files(
    name: str, files: list[Path], weight: float | None, identity: str, rule: SplitRule, column: Column
) -> Source:
    for path in files:
        _require_column(path, column.name)

    kind = "parquet" if files[0].name.endswith(PARQUET_SUFFIXES) else "jsonl"
    rows = [partial(_rows_of, path, column) for path in files]
    return _row_source(name, kind, weight, identity, sum(p.stat().st_size for p in files), rows, column, rule)


def _rows_of(path: Path, column: Column) -> Iterator[Row]:
    return parquet_rows(path, column.name) if path.name.endswith(PARQUET_SUFFIXES) else json_rows(path)


def _require_column(path: Path, column: str) -> None:
    """Look at the schema, or at the first row, before anything else is done."""
    if path.name.endswith(PARQUET_SUFFIXES):
        present = parquet_columns(path)
    else:
        first = next(json_rows(path), None)
        present = [column] if first is None else list(first[1])
    if column not in present:
        raise missing_column(str(path), column, present)


def _row_source(
    name: str, kind: str, weight: float | None, identity: str, size: int,
    rows: Sequence[Callable[[], Iterator[Row]]], column: Column, rule: SplitRule,
) -> Source:  # fmt: skip
    shards = tuple(partial(_row_documents, shard, column, rule) for shard in rows)

    def documents() -> Iterator[Document]:
        return chain.from_iterable(shard() for shard in shards)

    return Source(name, kind, weight, identity, size, rule, documents, shards)


def _row_documents(rows: Callable[[], Iterator[Row]], column: Column, rule: SplitRule) -> Iterator[Document]:
    for where, row, read in rows():
        if column.name not in row:
            raise missing_column(where, column.name, list(row))
        document = column.document(row[column.name], where, read, rule)
        if document is not None:
            yield document
