"""The picture of a search: loss against what a candidate costs, one panel per cost, and the front of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import count, fixed
from minitron_cli.drawing.frame import Frame, frame
from minitron_cli.drawing.svg import CHARACTER, el, join, line, marker, polyline, text

PANEL, HEIGHT, GAP, TOP = 440.0, 330.0, 30.0, 62.0
UNITS = (("bytes", 1.0), ("kB", 1e-3), ("MB", 1e-6), ("GB", 1e-9), ("TB", 1e-12))

STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.ground { fill: #fff; } text { fill: #59636e; } .title { font-size: 15px; font-weight: 600; }
.title, .name { fill: #1b1f24; } .name { font-weight: 600; }
.grid { stroke: #d9dee3; } .axis { stroke: #59636e; }
.course { stroke: #aab2ba; } .front { fill: none; stroke: #0072b2; stroke-width: 1.5; stroke-dasharray: 5 4; }
.before { fill: #fff; stroke: #8a939c; stroke-width: 1.3; } .after { fill: #59636e; } .left { fill: #c3cad1; }
.chosen { fill: #0072b2; } .ring { fill: none; stroke: #0072b2; stroke-width: 1.6; }
@media (prefers-color-scheme: dark) {
  .ground, .before { fill: #14171b; } text { fill: #9aa4af; } .title, .name { fill: #e6e9ec; }
  .grid { stroke: #313840; } .axis { stroke: #9aa4af; } .course { stroke: #59636e; } .after { fill: #9aa4af; }
  .left { fill: #4a525a; }
  .front, .ring { stroke: #56b4e9; } .chosen { fill: #56b4e9; }
}
"""


@dataclass(frozen=True)
class Dot:
    """One candidate in one panel. `losses`: at the ends of its rungs, or zero-shot alone where it was not distilled."""

    name: str
    cost: float
    losses: tuple[float, ...]
    finished: bool
    chosen: str

    @property
    def last(self) -> float:
        """The loss that stands for it."""
        return self.losses[-1]


def pareto_chart(result: Mapping[str, Any]) -> str:
    """An SVG file of a search's result: parameters, memory, and time per token where it was measured.

    A candidate's losses at the ends of its rungs stand above each other. The front (fewer costs, lower loss) runs
    through those that went all the way: only they were trained for the same number of steps.
    """
    costs = [("parameters", "params", 1.0), _memory(result)]
    if any(row.get("seconds_per_token") is not None for row in result["candidates"]):
        costs.append(("milliseconds per token", "seconds_per_token", 1e3))
    panels = [_dots(result, key, factor) for _, key, factor in costs]
    width = len(panels) * PANEL + GAP
    parts = [el("style", Markup(STYLE)), el("rect", class_="ground", width=width, height=HEIGHT)]
    parts += [text(GAP, 26, "Candidates by validation loss and cost", class_="title"), text(GAP, 44, _legend(result))]
    for place, (dots, (title, _, _)) in enumerate(zip(panels, costs, strict=True)):
        parts.append(_panel(dots, title, place * PANEL + GAP))
    label = f"Validation loss of {len(panels[0])} candidates against {', '.join(title for title, _, _ in costs)}."
    box = f"0 0 {width:.0f} {HEIGHT:.0f}"
    space = {"xmlns": "http://www.w3.org/2000/svg"}
    return f"{el('svg', join(parts), **space, viewBox=box, width=width, height=HEIGHT, role='img', aria_label=label)}\n"


def _memory(result: Mapping[str, Any]) -> tuple[str, str, float]:
    """Title and unit of the panel of memory."""
    cache = any(row["kv_bytes"] is not None for row in result["candidates"])
    unit, factor = max((each for each in UNITS if _bytes(result["candidates"][0]) * each[1] >= 1), key=lambda u: -u[1])
    return f"{unit} of weights{' and KV cache' if cache else ''}", "memory", factor


def _bytes(row: Mapping[str, Any]) -> int:
    return int(row["weight_bytes"]) + int(row["kv_bytes"] or 0)


def _legend(result: Mapping[str, Any]) -> str:
    steps = sorted({rung["step"] for rung in result["rungs"]})
    if not steps:
        return "Zero-shot losses. Dashed: the front."
    shown = ", ".join(map(str, steps))
    pale = "; pale: left before" if len(steps) > 1 else ""
    return f"Losses after {shown} steps; filled: the last{pale}. Dashed: the front of those that finished."


def _dots(result: Mapping[str, Any], key: str, factor: float) -> list[Dot]:
    ends = {rung["step"] for rung in result["rungs"]}
    chosen = {size["chosen"]: size["size"] or "chosen" for size in result["sizes"]}
    found = []
    for row in result["candidates"]:
        cost = _bytes(row) if key == "memory" else row.get(key)
        losses = tuple(point["loss"] for point in row["curve"] if point["step"] in (ends or {0}) and point["loss"])
        if cost is not None and losses:
            finished = row["steps"] == max(ends, default=0)
            found.append(Dot(row["name"], cost * factor, losses, finished, chosen.get(row["name"], "")))
    return found


def front(dots: Sequence[Dot]) -> list[Dot]:
    """Those that no other one beats in cost without being worse in loss, cheapest first."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.cost, dot.last)):
        if not found or dot.last < found[-1].last:
            found.append(dot)
    return found


def _panel(dots: Sequence[Dot], title: str, left: float) -> Markup:
    box = (44.0, TOP + 22, PANEL - GAP - 20, HEIGHT - 50)
    axes = frame(box, [dot.cost for dot in dots], [loss for dot in dots for loss in dot.losses], (title, "loss"))
    parts = [axes.grid]
    best = front([dot for dot in dots if dot.finished])
    if len(best) > 1:
        parts.append(polyline([(axes.x(dot.cost), axes.y(dot.last)) for dot in best], "front"))
    parts += [_candidate(dot, axes) for dot in sorted(dots, key=lambda dot: bool(dot.chosen))]
    parts += [_name(dot, axes) for dot in dots if dot.chosen]
    return el("g", join(parts), transform=f"translate({left:.0f} 0)")


def _candidate(dot: Dot, axes: Frame) -> Markup:
    x = axes.x(dot.cost)
    parts = [line(x, axes.y(dot.losses[0]), x, axes.y(dot.last), "course")]
    tip = f"{dot.name}: {', '.join(fixed(loss) for loss in dot.losses)}; {count(dot.cost)}"
    parts += [marker("circle", x, axes.y(loss), "before", tip, 2.6) for loss in dot.losses[:-1]]
    parts.append(marker("circle", x, axes.y(dot.last), _class(dot), tip, 4.4))
    if dot.chosen:
        parts.append(el("circle", cx=x, cy=axes.y(dot.last), r=8.5, class_="ring"))
    return join(parts)


def _class(dot: Dot) -> str:
    return "chosen" if dot.chosen else "after" if dot.finished else "left"


def _name(dot: Dot, axes: Frame) -> Markup:
    """The size beside the choice, on the side with room."""
    x, y = axes.x(dot.cost), axes.y(dot.last) + 4
    right = x + 13 + CHARACTER * len(dot.chosen) < axes.x.end + 24
    return text(x + 13 if right else x - 13, y, dot.chosen, anchor="start" if right else "end", class_="name")
