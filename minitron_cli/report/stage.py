"""The report stage: one HTML file that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron_cli.config.report import ReportConfig
from minitron_cli.errors import OutputError
from minitron_cli.manifest import sync_directory
from minitron_cli.report.alone import gather_any
from minitron_cli.report.page import render, render_several

REPORT = "report.html"
GENERATOR = b'<meta name="generator" content="minitron'
"""What tells a page of ours from a file that must not be replaced."""


@dataclass(frozen=True)
class ReportResult:
    """The page that was written; keys of `--json`."""

    out: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_report(config: ReportConfig) -> ReportResult:
    """Write the page of a run, or of several.

    Raises:
        UserError: RUN holds nothing to show, a file of it is damaged, or --out is something else.
    """
    return ReportResult(str(write_report(config.run, config.out)))


def write_report(run: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Read one run or several, write the page to `out` and return where it is.

    The page appears by a rename: a reader sees the old one or the new one, never a part.

    Args:
        out: default report.html, in the run, or for several in the current directory.

    Raises:
        InputError: RUN holds nothing to show, or a file of it is damaged.
        OutputError: `out` is a directory, or a file that is no report.
    """
    runs = [run] if isinstance(run, Path) else list(run)
    found = [gather_any(each) for each in runs]
    path = out if out is not None else runs[0] / REPORT if len(runs) == 1 else Path(REPORT)
    _check(path)
    text = render(found[0]) if len(found) == 1 else render_several(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return path


def _check(path: Path) -> None:
    """Refuse to replace what is not a page of ours."""
    if path.is_dir():
        raise OutputError(f"--out {path} is a directory; give the name of an HTML file.")
    if path.exists():
        with path.open("rb") as stream:
            if GENERATOR not in stream.read(2048) and path.stat().st_size:
                raise OutputError(f"--out {path} is not a report of ours; choose another name.")
