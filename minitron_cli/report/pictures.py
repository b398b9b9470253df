"""Pictures without axes of numbers: bars per layer, strips of neuron scores, a grid of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from minitron_cli.drawing.format import decimals, fixed, signed
from minitron_cli.drawing.svg import Scale, axis, chart, el, join, line, text
from minitron_cli.report.gather import Array

LEVELS = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1, 0.03)
"""Lower bounds of the shades, as shares of the reference score; one more shade lies below the last."""

SINGLE_CELLS = 600
"""Heads up to this number are drawn one by one and tell their score; more are drawn shade by shade."""


Levels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Strip:
    """Scores of the units of one layer (or of the whole model), and whether the layer was removed."""

    label: str
    scores: Array
    gone: bool = False


def layer_bars(
    title: str, values: Array, gone: Sequence[int], width: int, *, layers: Sequence[int] = (), unit: str = "layer"
) -> Markup:
    """One bar per layer, or per one of `layers` in that order; removed layers pale. `unit` stands below them."""
    height, left, top = 200, 44.0, 14.0
    bottom = height - 40.0
    marks, step, high = axis(min(0.0, float(values.min())), max(0.0, float(values.max())), 4)
    y = Scale(marks[0], high, bottom, top)
    slot = (width - left - 8) / len(values)
    bar = min(slot * 0.72, 56.0)
    every = max(1, int(np.ceil(26 / slot)))
    parts = []
    for tick in marks:
        parts += [line(left, y(tick), width - 8, y(tick), "axis" if tick == 0 else "grid")]
        parts += [text(left - 8, y(tick) + 4, fixed(tick, decimals(step)), anchor="end")]
    for place, (layer, value) in enumerate(zip(layers or range(len(values)), values, strict=True)):
        middle = left + slot * (place + 0.5)
        upper, lower = sorted((y(float(value)), y(0.0)))
        tip = el("title", f"layer {layer}: {signed(value)}{' (removed)' if layer in gone else ''}")
        class_ = "bar gone" if layer in gone else "bar"
        parts.append(
            el("rect", tip, x=middle - bar / 2, y=upper, width=bar, height=max(lower - upper, 0.8), class_=class_)
        )
        if slot >= 42:
            parts.append(text(middle, upper - 5, fixed(value, 2), anchor="middle", class_="value"))
        if place % every == 0:
            parts.append(text(middle, bottom + 16, layer, anchor="middle", class_="gone" if layer in gone else None))
    parts.append(text((left + width - 8) / 2, bottom + 34, unit, anchor="middle", class_="unit"))
    shown = ", ".join(
        f"layer {layer} {fixed(value)}" for layer, value in zip(layers or range(len(values)), values, strict=True)
    )
    return chart(width, height, f"{title}: {shown}.", parts)


def shade(shares: Array) -> Levels:
    """The number of the shade of each share; 0 is the strongest."""
    return np.asarray(len(LEVELS) - np.searchsorted(LEVELS[::-1], shares, side="right"), np.int64)


def strips(title: str, rows: Sequence[Strip], kept: float | None, width: int) -> Markup:
    """Per row its scores from strongest to weakest, as shades of the 99th percentile; a line where the cut is."""
    left, top, right = 44.0, 4.0 if kept is None else 22.0, width - 8.0
    pitch = float(np.clip(420 / len(rows), 7, 26))
    every = max(1, int(np.ceil(15 / pitch)))
    parts = []
    for index, row in enumerate(rows):
        y = top + index * pitch
        if index % every == 0:
            parts.append(
                text(left - 8, y + pitch / 2 + 4, row.label, anchor="end", class_="gone" if row.gone else None)
            )
        parts += _strip(row, left, right, y, pitch - min(3.0, pitch / 5))
    bottom = top + len(rows) * pitch
    if kept is not None:
        x = left + kept * (right - left)
        near_end = x > right - 60
        parts.append(line(x, top - 6, x, bottom + 2, "cut"))
        parts.append(text(x - 5, top - 9, "kept", anchor="end", class_="unit"))
        if not near_end:
            parts.append(text(x + 5, top - 9, "removed", class_="unit"))
    parts.append(text(left, bottom + 16, "strongest", class_="unit"))
    parts.append(text(right, bottom + 16, "weakest", anchor="end", class_="unit"))
    return chart(width, bottom + 24, title, parts)


def _strip(row: Strip, left: float, right: float, y: float, height: float) -> list[Markup]:
    ordered = np.sort(row.scores.reshape(-1))[::-1]
    reference = float(np.quantile(ordered, 0.99)) or 1.0
    shades = shade(ordered / reference)
    edges = np.searchsorted(shades, np.arange(len(LEVELS) + 2))  # shades only grow along a sorted row
    parts = []
    for level, (start, end) in enumerate(pairwise(edges)):
        if end > start:
            x, x_end = (left + float(edge) / len(ordered) * (right - left) for edge in (start, end))
            parts.append(el("rect", x=x, y=y, width=x_end - x, height=height, class_=f"h{level}"))
    return parts


def head_grid(title: str, scores: Array, gone: Sequence[int], group: int, width: int, *, unit: str = "head") -> Markup:
    """Layers down, heads (or other units) across, shaded by the share of the layer's strongest; gaps between groups."""
    layers, heads = scores.shape
    left, top = 44.0, 20.0
    gap = 4.0 if 1 < group < heads and scores.size <= SINGLE_CELLS else 0.0
    cell = min(48.0, (width - left - 8 - gap * (heads // max(group, 1))) / heads)
    pitch = float(np.clip(420 / layers, 7, 26))
    shades = shade(scores / np.maximum(scores.max(1, keepdims=True), 1e-30))
    places = [left + head * cell + gap * (head // max(group, 1)) for head in range(heads)]
    parts = []
    for head in range(0, heads, max(1, int(np.ceil(22 / cell)))):
        parts.append(text(places[head] + cell / 2, top - 6, head, anchor="middle"))
    for layer in range(0, layers, max(1, int(np.ceil(15 / pitch)))):
        class_ = "gone" if layer in gone else None
        parts.append(text(left - 8, top + layer * pitch + pitch / 2 + 4, layer, anchor="end", class_=class_))
    inner = (cell - min(2.0, cell / 6), pitch - min(3.0, pitch / 5))
    if scores.size <= SINGLE_CELLS:
        parts += _cells(scores, shades, places, top, pitch, inner, unit)
    else:
        parts.append(_merged_cells(shades, left, top, (places[-1] + cell - left) / heads, pitch))
    return chart(width, top + layers * pitch + 4, title, parts)


def _cells(
    scores: Array,
    shades: Levels,
    places: list[float],
    top: float,
    pitch: float,
    inner: tuple[float, float],
    unit: str,
) -> list[Markup]:
    parts = []
    for (layer, head), score in np.ndenumerate(scores):
        share = score / max(float(scores[layer].max()), 1e-30)
        tip = el(
            "title", f"layer {layer}, {unit} {head}: {fixed(score, 2)}, {100 * share:.0f} % of the layer's strongest"
        )
        x, y = places[head], top + layer * pitch
        parts.append(el("rect", tip, x=x, y=y, width=inner[0], height=inner[1], class_=f"h{shades[layer, head]}"))
    return parts


def _merged_cells(shades: Levels, left: float, top: float, cell: float, pitch: float) -> Markup:
    """All cells of one shade as one path of horizontal strokes, in units of cells; equal neighbours are one stroke."""
    paths: dict[int, list[str]] = {}
    for layer, row in enumerate(shades):
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, end in pairwise(edges):
            paths.setdefault(int(row[start]), []).append(f"M{start} {layer}h{end - start}")
    strokes = [
        el("path", d="".join(path), class_=f"h{level}", stroke_width="0.84") for level, path in sorted(paths.items())
    ]
    placed = f"translate({left:.1f} {top + pitch / 2:.1f}) scale({cell:.3f} {pitch:.3f})"
    return el("g", join(strokes), class_="lines", transform=placed)


def legend() -> Markup:
    """What the shades mean."""
    names = [*(f"over {100 * level:.0f} %" for level in LEVELS), "less"]
    swatches = [
        el("span", el("svg", el("rect", width="100%", height="100%", class_=f"h{level}"), aria_hidden="true") + name)
        for level, name in enumerate(names)
    ]
    return el("p", join(swatches), class_="legend")
