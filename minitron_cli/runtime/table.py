"""What commands print for people: lines and tables; plain text in files and pipes, ruled and coloured on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header. The first `left` columns are aligned left, the others, numbers, right.

    `strong`: the rows, from 0, that answer the question.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    strong: Sequence[int] = ()

    def __str__(self) -> str:
        """Columns as wide as their widest cell, two spaces apart."""
        every = [self.header, *self.rows] if any(self.header) else list(self.rows)
        widths = [max(len(row[column]) for row in every) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < self.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in every
        )

    @property
    def width(self) -> int:
        """Characters of the longest line."""
        return max(map(len, str(self).splitlines()), default=0)


Shown = str | Sequence[str | Table]
"""What is printed, part after part."""


def plain(shown: Shown) -> str:
    """The same as text."""
    return shown if isinstance(shown, str) else "\n".join(map(str, shown))


def put(shown: Shown, stream: TextIO | None = None) -> None:
    """Print on stdout. A terminal gets rules and colours (NO_COLOR: no colours), but no table wider than itself."""
    stream = stream or sys.stdout
    if isinstance(shown, str) or not stream.isatty():
        print(plain(shown), file=stream, flush=True)
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    for part in shown:
        if isinstance(part, Table) and part.width + len(part.header) <= console.width:
            console.print(_ruled(part))
        else:
            print(part, file=stream)
    stream.flush()


def _ruled(table: Table) -> object:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_header=any(table.header),
                      header_style="bold cyan")  # fmt: skip
    for column, title in enumerate(table.header):
        drawn.add_column(title, justify="left" if column < table.left else "right", no_wrap=True)
    for number, row in enumerate(table.rows):
        drawn.add_row(*row, style="bold" if number in table.strong else None)
    return drawn
