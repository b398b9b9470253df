"""Small pieces of SVG: escaped elements, scales, ticks, and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE, NARROW = 880, 360
"""Widths charts are drawn at: for a desktop or paper, and for a phone. CSS shows one of the two."""

CHARACTER = 6.6
"""Average width of a character at the charts' 12px text, on the safe side."""


def el(tag: str, content: object = "", **attributes: object) -> Markup:
    """One element; values are escaped, `stroke_width` becomes `stroke-width`, `class_` becomes `class`."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(short(value) if isinstance(value, float) else value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}>{escape(content)}</{tag}>")


def short(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after another."""
    return Markup("").join(parts)


def chart(width: int, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    """A drawing with a text for those who do not see it."""
    box = f"0 0 {width} {math.ceil(height)}"
    return el("svg", join(parts), class_="chart", viewBox=box, role="img", aria_label=label)


def both(draw: Callable[[int], Markup]) -> Markup:
    """A drawing at both widths."""
    return el("div", draw(WIDE), class_="wide") + el("div", draw(NARROW), class_="narrow")


def text(x: float, y: float, content: object, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """One line of text."""
    return el("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return el("polyline", points=" ".join(f"{short(x)},{short(y)}" for x, y in points), class_=class_)


def marker(name: str, x: float, y: float, class_: str, title: str = "", size: float = 3.6) -> Markup:
    """A point whose form tells the series apart without colour."""
    tip = el("title", title) if title else ""
    if name in ("cross-entropy", "square"):
        return el("rect", tip, x=x - size, y=y - size, width=2 * size, height=2 * size, class_=class_)
    if name in ("scratch", "triangle"):
        corners = [(x, y - 1.3 * size), (x + 1.2 * size, y + size), (x - 1.2 * size, y + size)]
        return el("polygon", tip, points=" ".join(f"{short(a)},{short(b)}" for a, b in corners), class_=class_)
    return el("circle", tip, cx=x, cy=y, r=size, class_=class_)


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, wanted: int) -> tuple[list[float], float]:
    """About `wanted` round values that cover [low, high], and their step: 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        spread = abs(low) * 0.05 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)], step


def axis(low: float, high: float, wanted: int) -> tuple[list[float], float, float]:
    """Ticks, their step, and where the axis ends: at the last tick, or before it where much room would stay empty."""
    marks, step = ticks(low, high, wanted)
    if high > low and marks[-1] - high > 0.3 * step:
        return marks[:-1], step, high + 0.05 * (high - marks[0])
    return marks, step, marks[-1]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` from each other, inside [low, high] while there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap if placed else low))
    limit = high
    for position in reversed(range(len(placed))):
        placed[position] = min(placed[position], limit)
        limit = placed[position] - gap
    result = [0.0] * len(wanted)
    for index, value in zip(order, placed, strict=True):
        result[index] = value
    return result
