"""Options of `minitron report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_cli.config.base import StageConfig, argument, option


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    """Write one self-contained HTML page of a run."""

    run: Path = argument("Directory written by `minitron run` or `minitron compress`.")
    out: Path | None = option(None, "HTML file to write; default RUN/report.html.")
