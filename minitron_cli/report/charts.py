"""Charts with axes: validation loss over tokens, training loss, candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from minitron_cli.drawing.format import count, fixed
from minitron_cli.drawing.frame import Frame, frame
from minitron_cli.drawing.svg import CHARACTER, WIDE, apart, axis, chart, el, join, line, marker, polyline, short, text
from minitron_cli.report.gather import Array, Curve

POINTS = 240
"""Points a training loss is drawn with at most."""


@dataclass(frozen=True)
class Dot:
    """One candidate of a search."""

    rank: str
    name: str
    params: float
    zero_shot: float | None
    retrained: float | None
    chosen: bool


def validation_chart(curves: Sequence[Curve], teacher: float | None, width: int) -> Markup:
    """Validation loss of every trained model over tokens; the teacher as a dashed line; names at the lines' ends."""
    drawn = [curve for curve in curves if curve.validation]
    ends = [(curve.name, curve.label, curve.validation[-1][1]) for curve in drawn]
    if teacher is not None:
        ends.append(("teacher", "teacher", teacher))
    names = [f"{label} {fixed(value)}" for _, label, value in ends]
    height = 340 if width == WIDE else 300
    right = width - 20 - 1.06 * CHARACTER * max(len(name) for name in names)
    box = (44.0, 34.0, right, height - 44.0)
    tokens = [value for curve in drawn for value, _ in curve.validation]
    axes = frame(box, tokens, validation_range(drawn, teacher), ("training tokens", "nats per token"), from_zero=True)
    parts = [axes.grid]
    if teacher is not None:
        parts.append(line(box[0], axes.y(teacher), right, axes.y(teacher), "stroke teacher dashed"))
    seen = (box[0] - 8, box[1], right - box[0] + 16, box[3] - box[1] + 8)
    lines = join(_validation_line(curve, axes) for curve in drawn)
    shape = dict(zip(("x", "y", "width", "height"), seen, strict=True))
    parts.append(el("svg", lines, **shape, viewBox=" ".join(short(value) for value in seen)))  # cuts what is above
    heights = apart([axes.y(value) for _, _, value in ends], 16, box[1], box[3])
    for (name, _, value), shown, y in zip(ends, names, heights, strict=True):
        parts.append(line(right + 3, axes.y(value), right + 11, y, f"stroke thin {name}"))
        parts.append(text(right + 14, y + 4, shown, class_=f"name {name}"))
    return chart(width, height, f"Validation loss over training tokens; at the end: {', '.join(names)}.", parts)


def validation_range(curves: Sequence[Curve], teacher: float | None) -> list[float]:
    """Lowest and highest loss shown. High starts are left out, so that the ends can be told apart."""
    values = [value for curve in curves for _, value in curve.validation] + ([] if teacher is None else [teacher])
    low, high = min(values), max(values)
    worst = max(curve.validation[-1][1] for curve in curves)
    if all(len(curve.validation) > 3 for curve in curves) and worst > low:
        high = min(high, low + 1.6 * (worst - low))
    return [low, high]


def starts_above(curves: Sequence[Curve], teacher: float | None) -> str:
    """A sentence about the curves that begin above the chart, or nothing."""
    low, high = validation_range(curves, teacher)
    top = min(axis(low, high, wanted)[2] for wanted in (4, 5))  # the chart ends at a tick, at either width
    above = [curve for curve in curves if curve.validation[0][1] > top]
    shown = ", ".join(f"{curve.label} {fixed(curve.validation[0][1])}" for curve in above)
    return f"Begin above the chart: {shown}." if above else ""


def _validation_line(curve: Curve, axes: Frame) -> Markup:
    points = [(axes.x(tokens), axes.y(value)) for tokens, value in curve.validation]
    parts = [polyline(points, f"stroke {curve.name}")]
    if len(points) <= 60:
        for (x, y), (tokens, value) in zip(points, curve.validation, strict=True):
            tip = f"{curve.label}: {fixed(value)} after {count(tokens)} tokens"
            parts.append(marker(curve.name, x, y, f"fill {curve.name}", tip))
    return join(parts)


def window(curve: Curve) -> int:
    """Steps that one point of the smoothed training loss averages."""
    return max(1, len(curve.loss) // 40)


def smoothed(curve: Curve) -> tuple[Array, Array]:
    """Tokens and the mean of the `window` steps around (fewer at both ends), as many points as are drawn."""
    values = np.where(np.isfinite(curve.loss), curve.loss, 0.0)
    known = np.isfinite(curve.loss).astype(np.float64)
    span = window(curve)
    sums, counts = (np.concatenate([[0.0], np.cumsum(item)]) for item in (values, known))
    steps = np.unique(np.linspace(1, len(values), min(POINTS, len(values))).round().astype(int))
    starts, ends = np.maximum(steps - 1 - span // 2, 0), np.minimum(steps + span // 2, len(values))
    some = counts[ends] > counts[starts]
    steps, starts, ends = steps[some], starts[some], ends[some]
    return steps * curve.tokens_per_step, (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def extremes(curve: Curve) -> list[tuple[float, float]]:
    """The single steps' losses: all of them, or the smallest and largest of each of POINTS stretches."""
    steps = np.flatnonzero(np.isfinite(curve.loss))
    if len(steps) > 2 * POINTS:
        parts = [part for part in np.array_split(steps, POINTS) if len(part)]
        picked = [[part[curve.loss[part].argmin()], part[curve.loss[part].argmax()]] for part in parts]
        steps = np.unique(np.concatenate(picked))
    return [(float(step + 1) * curve.tokens_per_step, float(curve.loss[step])) for step in steps]


def training_chart(curve: Curve, limits: tuple[float, float], width: int = 300) -> Markup:
    """Training loss of one model: single steps pale, their running mean strong. Same `limits` for the same unit."""
    box = (40.0, 26.0, width - 10.0, 168.0)
    unit = "KL to the teacher" if curve.kind == "kl" else "cross-entropy"
    tokens, means = smoothed(curve)
    axes = frame(box, [0.0, float(tokens[-1])], limits, ("training tokens", f"{unit}, nats per token"), from_zero=True)
    low, high = axes.y.low, axes.y.high
    raw = [(axes.x(x), axes.y(min(max(y, low), high))) for x, y in extremes(curve)]
    mean = [(axes.x(float(x)), axes.y(min(max(float(y), low), high))) for x, y in zip(tokens, means, strict=True)]
    label = (
        f"Training loss of the {curve.label} model, {unit}: {fixed(means[0])} at first, {fixed(means[-1])} at the end."
    )
    parts = [axes.grid, polyline(raw, f"stroke thin pale {curve.name}"), polyline(mean, f"stroke {curve.name}")]
    above = min([y for x, y in raw if x > box[2] - 50], default=box[3]) - 6
    parts.append(text(box[2], above, fixed(means[-1]), anchor="end", class_=f"name {curve.name}"))
    return chart(width, 212, label, parts)


def training_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """A range for the charts of one unit: all running means, and a little room."""
    values = np.concatenate([smoothed(curve)[1] for curve in curves])
    low = 0.0 if curves[0].kind == "kl" else float(values.min())
    return low, float(values.max())


def search_chart(dots: Sequence[Dot], unit: str, width: int) -> Markup:
    """Parameters against loss: zero-shot hollow, retrained full, one line per candidate; the chosen one ringed."""
    height = 380 if width == WIDE else 330
    box = (44.0, 34.0, width - 24.0, height - 44.0)
    losses = [value for dot in dots for value in (dot.zero_shot, dot.retrained) if value is not None]
    axes = frame(box, [dot.params for dot in dots], losses, (unit, "nats per token"))
    parts = [axes.grid, _front_line(dots, axes)]
    for dot in sorted(dots, key=lambda dot: dot.chosen):
        parts += _candidate(dot, axes)
    parts += _ranks(dots, axes)
    best = next((dot for dot in dots if dot.chosen), dots[0])
    label = f"{len(dots)} candidates by parameters and loss; chosen: {best.name} with {count(best.params)} parameters."
    return chart(width, height, label, parts)


def front(dots: Sequence[Dot]) -> list[Dot]:
    """The candidates that no other beats in both parameters and loss, among those measured alike: after the short
    distillation where at least two were distilled, else before it. In the order of their parameters.
    """
    trained = [dot for dot in dots if dot.retrained is not None]
    measured = [(dot, dot.retrained) for dot in trained] if len(trained) > 1 else [(dot, dot.zero_shot) for dot in dots]
    best, found = float("inf"), []
    for dot, loss in sorted(measured, key=lambda pair: (pair[0].params, pair[1] if pair[1] is not None else best)):
        if loss is not None and loss < best:
            best = loss
            found.append(dot)
    return found


def _front_line(dots: Sequence[Dot], axes: Frame) -> Markup:
    """The front as steps: down at each of its candidates, then level to the next."""
    trained = sum(dot.retrained is not None for dot in dots) > 1
    points: list[tuple[float, float]] = []
    for dot in front(dots):
        loss = dot.retrained if trained else dot.zero_shot
        assert loss is not None
        points += [(axes.x(dot.params), points[-1][1])] if points else []
        points.append((axes.x(dot.params), axes.y(loss)))
    return polyline(points, "stroke front")


def _candidate(dot: Dot, axes: Frame) -> list[Markup]:
    x, class_ = axes.x(dot.params), "chosen" if dot.chosen else "other"
    found = [
        (kind, value) for kind, value in (("hollow", dot.zero_shot), ("solid", dot.retrained)) if value is not None
    ]
    parts = []
    if len(found) == 2:
        parts.append(line(x, axes.y(found[0][1]), x, axes.y(found[1][1]), f"stroke thin {class_}"))
    for kind, value in found:
        what = "before retraining" if kind == "hollow" else "after short distillation"
        tip = f"{dot.name}: {count(dot.params)} parameters, {fixed(value)} {what}"
        parts.append(marker("circle", x, axes.y(value), f"{kind} {class_}", tip, 5.0))
    if dot.chosen and found:
        parts.append(el("circle", cx=x, cy=axes.y(found[-1][1]), r=9.5, class_="stroke chosen ring"))
    return parts


def _ranks(dots: Sequence[Dot], axes: Frame) -> list[Markup]:
    """The rank beside each candidate's best measurement: right of it, left of it, or nowhere if both are taken."""
    points = [
        (axes.x(dot.params), axes.y(value))
        for dot in dots
        for value in (dot.zero_shot, dot.retrained)
        if value is not None
    ]
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    parts: list[Markup] = []
    for dot in sorted(dots, key=lambda dot: not dot.chosen):
        value = dot.retrained if dot.retrained is not None else dot.zero_shot
        if value is None:
            continue
        shown = f"{dot.rank} chosen" if dot.chosen else dot.rank
        x, y, long, away = axes.x(dot.params), axes.y(value), CHARACTER * len(shown), 13 if dot.chosen else 8
        for start, anchor in ((x + away, "start"), (x - away - long, "end")):
            place = (start - 2, y - 5, start + long + 3, y + 5)
            if place[2] < axes.x.end + 27 and not any(_overlap(place, other) for other in boxes):
                boxes.append(place)
                at = start if anchor == "start" else x - away
                parts.append(text(at, y + 4, shown, anchor=anchor, class_="name chosen" if dot.chosen else None))
                break
    return parts


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
