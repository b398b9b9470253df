"""Progress and messages on stderr: one live line on a terminal, a line now and then in a log, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

_quiet = False

LOG_SECONDS = 10.0
"""How often a progress line is printed where stderr is not a terminal."""

REFRESH_SECONDS = 0.1


def set_quiet(quiet: bool) -> None:
    """Silence `say` and `Progress` for the rest of the process (errors are not affected)."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """One line for the person at the keyboard."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`7s`, `3m05s`, `2h10m`, `4d06h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def quantity(number: float) -> str:
    """`950`, `5.4k`, `1.2M`, `8.3B`: three figures at most."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def byte_size(count: float) -> str:
    """`64B`, `3.39MB`, `21.4GB`, in powers of ten."""
    return quantity(count).replace("B", "G") + "B"


class Progress:
    """`distill  120/400 steps  30%  5.4k tokens/s  1m10s left  loss 2.31`

    `total` and `advance` count in `unit`; `rate_unit` and its increments give the rate shown, when another count
    (tokens, bytes) says more. `start` is work already done before this run (resume) and does not enter the rate.
    """

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, rate_unit: str = "") -> None:
        self.title, self.total, self.unit, self.rate_unit = title, total, unit, rate_unit or unit
        self.start = self.done = start
        self.rated = 0.0
        self.note = ""
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, count: int = 1, *, rated: float | None = None, note: str = "") -> None:
        """Count work; `rated` is the increment of the rate's unit; `note` ends the line."""
        self.done += count
        self.rated += count if rated is None else rated
        self.note = note or self.note
        now = time.monotonic()
        if now - self.shown >= (REFRESH_SECONDS if self.live else LOG_SECONDS):
            self.shown = now
            self._print()

    def line(self) -> str:
        """The text of the progress line as of now."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        fresh = self.done - self.start
        left = (self.total - self.done) * elapsed / fresh if fresh else 0.0
        share = 100 * self.done / self.total if self.total else 100.0
        parts = [f"{self.title}  {self._count()}  {share:.0f}%"]
        if fresh:
            parts += [f"{quantity(self.rated / elapsed)} {self.rate_unit}/s", f"{duration(left)} left"]
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)

    def _count(self) -> str:
        """`120/400 steps`, `510M/715M bytes`."""
        shown = str if self.total < 1_000_000 else quantity
        return f"{shown(self.done)}/{shown(self.total)} {self.unit}"

    def _print(self) -> None:
        if _quiet:
            return
        if self.live:
            print(f"\r\x1b[K{self.line()}", end="", file=sys.stderr, flush=True)
        else:
            say(self.line())

    def close(self) -> None:
        """Replace the live line by a final one."""
        if _quiet:
            return
        elapsed = time.monotonic() - self.began
        rate = f"  {quantity(self.rated / max(elapsed, 1e-9))} {self.rate_unit}/s" if self.done > self.start else ""
        end = "\r\x1b[K" if self.live else ""
        tail = f"  {self.note}" if self.note else ""
        say(f"{end}{self.title}  {self._count()} in {duration(elapsed)}{rate}{tail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self.live and not _quiet:
            print(file=sys.stderr)
