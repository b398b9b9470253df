"""The inside of a chart: scales, grid, numbers along the axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from minitron_cli.drawing.format import decimals, fixed, scaled
from minitron_cli.drawing.svg import Scale, axis, join, line, text, ticks


@dataclass(frozen=True)
class Frame:
    """The inside of a chart: two scales, and the grid with its numbers."""

    x: Scale
    y: Scale
    grid: Markup


def frame(
    box: tuple[float, float, float, float], xs: Sequence[float], ys: Sequence[float], units: tuple[str, str], *,
    from_zero: bool = False, numbered: bool = True,
) -> Frame:  # fmt: skip
    """Axes for the values, inside `box` (left, top, right, bottom); `units` name the two axes.

    `numbered=False`: the horizontal axis is left to the caller and ends where the values do.
    """
    left, top, right, bottom = box
    x_ticks, x_step = ticks(0 if from_zero else min(xs), max(xs), max(5, int((right - left) // 110)))
    y_ticks, y_step, y_high = axis(min(ys), max(ys), max(4, int((bottom - top) // 45)))
    x = Scale(min(x_ticks[0], min(xs)), max(xs) if from_zero or not numbered else x_ticks[-1], left, right)
    y = Scale(y_ticks[0], y_high, bottom, top)
    digits = decimals(y_step)
    parts = []
    for tick in y_ticks:
        parts += [line(left, y(tick), right, y(tick), "grid")]
        parts += [text(left - 8, y(tick) + 4, fixed(tick, digits), anchor="end")]
    for tick in x_ticks if numbered else ():
        if tick <= x.high * (1 + 1e-9):
            parts += [line(x(tick), bottom, x(tick), bottom + 4, "axis")]
            parts += [text(x(tick), bottom + 18, scaled(tick, x_step), anchor="middle")]
    parts += [line(left, bottom, right, bottom, "axis")]
    parts += [text((left + right) / 2, bottom + 36, units[0], anchor="middle", class_="unit")]
    parts += [text(0, top - 14, units[1], class_="unit")]
    return Frame(x, y, join(parts))
