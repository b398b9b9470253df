"""The report stage: one HTML file that needs nothing but itself."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron_cli.config.report import ReportConfig
from minitron_cli.errors import OutputError
from minitron_cli.manifest import sync_directory
from minitron_cli.report.gather import gather
from minitron_cli.report.page import render

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
    """Write the page of a run.

    Raises:
        UserError: RUN is not a run directory, a file of it is damaged, or --out is something else.
    """
    return ReportResult(str(write_report(config.run, config.out)))


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Read a run, write its page to `out` (default RUN/report.html) and return where it is.

    The page appears by a rename: a reader sees the old one or the new one, never a part.

    Raises:
        InputError: RUN is not a run directory, or a file of it is damaged.
        OutputError: `out` is a directory, or a file that is no report.
    """
    files = gather(run_dir)
    path = run_dir / REPORT if out is None else out
    _check(path)
    text = render(files)
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
