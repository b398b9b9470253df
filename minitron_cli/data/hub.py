"""Rows through the `datasets` library: data sets of the Hub, streamed, and directories made by `save_to_disk`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minitron_cli.data.documents import missing_column
from minitron_cli.data.readers import Row
from minitron_cli.errors import InputError

# Its retries are not our user's news; what fails in the end is told in one sentence.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_hub(name: str, subset: str | None, split: str) -> Any:
    """A Hub data set for streaming; nothing is downloaded whole, no code of the data set is run.

    Raises:
        InputError: not a Hub id, no such data set, subset or split, or no answer from the Hub.
    """
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} is neither an existing path nor a Hub data set id (owner/name).")
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # network, permission, unknown names: the library raises many kinds
        raise InputError(
            f"{name} is not an existing path, and the Hub gives no such data set: {_first_line(error)}"
        ) from None


def hub_rows(name: str, subset: str | None, split: str, column: str) -> list[Callable[[], Iterator[Row]]]:
    """Rows of a Hub data set, by its shards.

    Raises:
        InputError: from `open_hub`, or no such column.
    """
    return by_shards(open_hub(name, subset, split), name, column)


def by_shards(dataset: Any, name: str, column: str) -> list[Callable[[], Iterator[Row]]]:
    """Rows of a streamed data set, by its shards, in its order.

    Raises:
        InputError: no such column.
    """
    count = dataset.num_shards
    if count == 1:
        return [_rows(dataset, name, column)]
    return [_rows(dataset.shard(count, index), f"{name} shard {index}", column) for index in range(count)]


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote the directory with `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or ((path / "state.json").exists() and any(path.glob("*.arrow")))


def open_saved(path: Path, split: str) -> Any:
    """A `save_to_disk` directory; rows come out of memory maps.

    Raises:
        InputError: damaged, or no such split.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # Arrow, JSON and OS errors
        raise InputError(f"{path} is a damaged saved data set: {_first_line(error)}") from None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise InputError(
                f"{path} has no split '{split}', only {', '.join(sorted(dataset))}; choose with --hub-split."
            )
        return dataset[split]
    return dataset


def saved_rows(path: Path, split: str, column: str) -> Callable[[], Iterator[Row]]:
    """Rows of a `save_to_disk` directory.

    Raises:
        InputError: from `open_saved`, or no such column.
    """
    return _rows(open_saved(path, split), str(path), column)


def _rows(dataset: Any, name: str, column: str) -> Callable[[], Iterator[Row]]:
    columns = dataset.column_names  # None where only the rows themselves tell
    if columns is not None:
        if column not in columns:
            raise missing_column(name, column, columns)
        dataset = dataset.select_columns([column])

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for number, row in enumerate(dataset, 1):
                yield f"{name} row {number}", row, 0
        except Exception as error:  # the stream breaks off: network, decoding
            raise InputError(f"{name} broke off after row {number}: {_first_line(error)}") from error

    return rows


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
