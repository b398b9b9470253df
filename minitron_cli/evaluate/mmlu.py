"""MMLU from a folder of CSV files in the layout of its authors.

    DIR/dev/SUBJECT_dev.csv      the solved examples, in order
    DIR/test/SUBJECT_test.csv    the questions

No header; columns: question, four choices, the letter of the answer. Only the rows come from here; prompts, groups
and averages are the harness's own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitron_cli.errors import InputError

SPLITS = ("dev", "test")
LETTERS = "ABCD"

STANDARD_SHOTS = 5
"""The harness leaves the number open; five is what published MMLU numbers use."""


def find_folder(data_dir: Path) -> Path:
    """`data_dir` or the `mmlu` folder inside it, whichever holds dev/ and test/.

    Raises:
        InputError: neither does.
    """
    for folder in (data_dir, data_dir / "mmlu"):
        if all((folder / split).is_dir() for split in SPLITS):
            return folder
    raise InputError(f"{data_dir} does not hold MMLU: it needs dev/ and test/ folders of CSV files, here or in mmlu/.")


def subject_file(folder: Path, subject: str, split: str) -> Path:
    """Where the rows of one subject and split lie."""
    return folder / split / f"{subject}_{split}.csv"


def require_subjects(folder: Path, subjects: Iterable[str]) -> None:
    """Check that the files of all subjects are there, before any is read.

    Raises:
        InputError: names the files that are missing.
    """
    wanted = [subject_file(folder, subject, split) for subject in subjects for split in SPLITS]
    missing = [str(path.relative_to(folder)) for path in wanted if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise InputError(f"{folder} lacks {', '.join(missing[:6])}{more}; complete it or choose fewer --tasks.")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The questions of one file: `question`, `choices` (4 texts) and `answer` (0 to 3), text exactly as written.

    Raises:
        InputError: the file has no rows, or a row is not a question.
    """
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.reader(stream), 1):
                if len(row) != 6 or row[5] not in tuple(LETTERS):
                    raise InputError(
                        f"{path}, row {number}: expected question, four choices and a letter A to D, "
                        f"got {len(row)} columns ending in {row[-1] if row else ''!r}."
                    )
                rows.append({"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])})
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a UTF-8 CSV file ({error}); get a fresh copy.") from None
    if not rows:
        raise InputError(f"{path} has no rows; get a fresh copy.")
    return rows
