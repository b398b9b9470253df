"""Options of `minitron report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_cli.config.base import StageConfig, argument, option
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    """Write one self-contained HTML page of a run, a search or another stage, or of several runs side by side."""

    run: tuple[Path, ...] = argument(
        "Directory written by `minitron run`, `compress` or one stage, or a folder of such; several are compared."
    )
    out: Path | None = option(None, "HTML file to write; default report.html in RUN, or here for several.")

    def __post_init__(self) -> None:
        if isinstance(self.run, (str, Path)):
            object.__setattr__(self, "run", (self.run,))
        super().__post_init__()

    def check(self) -> None:
        if not self.run:
            raise ConfigError("report needs at least one RUN: a directory that `minitron run` or a stage wrote.")
