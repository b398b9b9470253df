"""The corpus that comes with every Python: the source of the running interpreter's standard library."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

from minitron_cli.errors import InputError

NAME = "python-stdlib"

MAX_BYTES = 400_000
"""Larger files of the library are tables, not code that somebody wrote."""

_SKIPPED_DIRECTORIES = {
    *("site-packages", "dist-packages"),  # what the user installed
    *("test", "tests", "idle_test"),  # half of the library by size, and repetitive
    "encodings",  # character tables
    *("__pycache__", "__phello__"),
}
_SKIPPED_FILES = re.compile(r"pydoc_data/topics\.py|config-[^/]*/.*|(.*/)?_sysconfig(data|_vars).*")
_GENERATED = re.compile(
    r"auto(matically)?[- ]?generated|\bfile (is|was|has been) generated|^#.*\bgenerated (by|from)\b|do not edit",
    re.IGNORECASE | re.MULTILINE,
)
_HEAD_LINES = 6
"""Generated files say so at their top; further down the words are about something else."""


def stdlib_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """(path relative to the library, path) of every source file that makes good text, sorted by relative path.

    Left out: tests, encodings tables, generated files, installed packages, files over 400 kB, and whatever a symbolic
    link brings in from elsewhere. `root` replaces the library's directory (for tests).

    Raises:
        InputError: this Python has no library source (some embedded builds keep it in a zip of byte code).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    home = root.resolve()
    found = []
    for folder, directories, names in os.walk(root):
        directories[:] = [name for name in directories if name not in _SKIPPED_DIRECTORIES]
        for name in names:
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if name.endswith(".py") and path.resolve().is_relative_to(home) and _is_wanted(key, path):
                found.append((key, path))
    if not found:
        raise InputError(f"{NAME}: this Python has no library source in {root}; name a directory of text instead.")
    return sorted(found)


def _is_wanted(key: str, path: Path) -> bool:
    if _SKIPPED_FILES.fullmatch(key):
        return False
    try:
        if path.stat().st_size > MAX_BYTES:
            return False
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):  # a few old files declare another encoding; no corpus hangs on them
        return False
    return bool(text.strip()) and not _GENERATED.search("\n".join(text.split("\n", _HEAD_LINES)[:_HEAD_LINES]))
