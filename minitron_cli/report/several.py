"""Several runs side by side: one table, sizes against losses, the students' curves, tasks, cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import NONE, count, fixed, number, percent, ratio, scaled, signed
from minitron_cli.drawing.frame import frame
from minitron_cli.drawing.svg import CHARACTER, WIDE, apart, both, chart, line, marker, polyline, text
from minitron_cli.report.answer import the_student
from minitron_cli.report.gather import Model, RunFiles, table
from minitron_cli.report.sections import AXES, IMPLIED
from minitron_cli.report.tasks import main_metric
from minitron_cli.runtime.progress import duration

SERIES = ("s0", "s1", "s2", "s3", "s4", "s5")
"""Colours of runs; more runs begin again, told apart by their numbers."""

MARKS = ("circle", "square", "triangle")


def series(place: int) -> str:
    """The colour of a run."""
    return SERIES[place % len(SERIES)]


def several(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Everything the page of several runs shows."""
    students = [the_student(files) for files in runs]
    names = distinct([str(files.run.get("name") or files.path.name) for files in runs], runs)
    tasks = list(dict.fromkeys(task for model in students if model for task in model.tasks))
    dots = [
        (place, names[place], model)
        for place, model in enumerate(students)
        if model is not None and model.params and model.loss is not None
    ]
    curves = [(place, names[place], _curve(files)) for place, files in enumerate(runs) if _curve(files)]
    return {
        "names": names,
        "rows": [_row(place, names[place], files, students[place]) for place, files in enumerate(runs)],
        "dots": both(lambda width: dots_chart(dots, width)) if len(dots) > 1 else None,
        "curves": both(lambda width: curves_chart(curves, width)) if curves else None,
        "tasks": [row for task in tasks if (row := _task(task, runs, students))],
        "cuts": _cuts(runs),
        "speed": _speed(runs),
        "best": _best(names, students),
    }


def distinct(names: list[str], runs: Sequence[RunFiles]) -> list[str]:
    """Names of runs; those that are alike carry their directories."""
    return [
        name if names.count(name) == 1 else f"{name} ({files.path})" for name, files in zip(names, runs, strict=True)
    ]


def _row(place: int, name: str, files: RunFiles, student: Model | None) -> dict[str, Any]:
    teacher = files.model("teacher")
    seconds = sum(number(manifest.get("seconds")) or 0.0 for manifest in files.manifests.values())
    gap = student.loss - teacher.loss if student and teacher and student.loss is not None and teacher.loss else None
    loss, params = (student.loss, student.params) if student else (None, None)
    whole = teacher.params if teacher else None
    cells = [
        str(files.recipe.get("teacher") or files.run.get("teacher") or NONE), count(params), percent(params, whole),
        count(student.tokens) if student and student.tokens else NONE, fixed(loss), signed(gap),
        ratio(student.perplexity if student else None), fixed(student.bits_per_byte if student else None),
        duration(seconds) if seconds else NONE,
    ]  # fmt: skip
    return {"series": series(place), "mark": MARKS[place % len(MARKS)], "name": name, "cells": cells}


def _best(names: Sequence[str], students: Sequence[Model | None]) -> str:
    """The run with the lowest bits per byte (losses compare only within one tokenizer)."""
    known = [(student.bits_per_byte, name) for student, name in zip(students, names, strict=True)
             if student and student.bits_per_byte is not None]  # fmt: skip
    if len(known) < 2:
        return ""
    value, name = min(known)
    return f"{name} ends lowest, with {fixed(value)} bits per byte; the highest is {fixed(max(known)[0])}."


def dots_chart(dots: Sequence[tuple[int, str, Model]], width: int) -> Markup:
    """Each run's student by parameters and loss."""
    height = 320
    box = (44.0, 34.0, width - 24.0, height - 44.0)
    values = [(float(model.params or 0), float(model.loss or 0)) for _, _, model in dots]
    axes = frame(box, [x for x, _ in values], [y for _, y in values], ("parameters", "nats per token"))
    parts = [axes.grid]
    for (place, name, _), (params, loss) in zip(dots, values, strict=True):
        x, y = axes.x(params), axes.y(loss)
        tip = f"{name}: {count(params)} parameters, {fixed(loss)} nats per token"
        parts.append(marker(MARKS[place % len(MARKS)], x, y, f"fill {series(place)}", tip, 5.5))
        right = x + 10 + CHARACTER * len(name) < width
        parts.append(text(x + 10 if right else x - 10, y + 4, name, anchor="start" if right else "end",
                          class_=f"name {series(place)}"))  # fmt: skip
    told = "; ".join(
        f"{name} {scaled(p, p / 100)} parameters, loss {fixed(q)}"
        for (_, name, _), (p, q) in zip(dots, values, strict=True)
    )
    return chart(width, height, f"Students by parameters and validation loss: {told}.", parts)


def _curve(files: RunFiles) -> list[tuple[float, float]]:
    return next((curve.validation for curve in files.curves if curve.name == "student" and curve.validation), [])


def curves_chart(curves: Sequence[tuple[int, str, list[tuple[float, float]]]], width: int) -> Markup:
    """The students' validation losses over tokens; starts that would flatten the rest are cut."""
    names = [f"{name[:22]} {fixed(points[-1][1])}" for _, name, points in curves]
    height = 340 if width == WIDE else 300
    right = width - 20 - 1.06 * CHARACTER * max(len(name) for name in names)
    box = (44.0, 34.0, right, height - 44.0)
    values = [value for _, _, points in curves for _, value in points]
    low, worst = min(values), max(points[-1][1] for _, _, points in curves)
    high = min(max(values), low + max(1.6 * (worst - low), 0.4))
    tokens = [at for _, _, points in curves for at, _ in points]
    axes = frame(box, tokens, [low, high], ("training tokens", "nats per token"), from_zero=True)
    parts = [axes.grid]
    heights = apart([axes.y(points[-1][1]) for _, _, points in curves], 16, box[1], box[3])
    for (place, _, points), name, y in zip(curves, names, heights, strict=True):
        drawn = [(axes.x(at), max(axes.y(value), box[1])) for at, value in points]
        end = drawn[-1]
        parts.append(polyline(drawn, f"stroke {series(place)}"))
        parts.append(line(end[0] + 3, end[1], right + 11, y, f"stroke thin {series(place)}"))
        parts.append(text(right + 14, y + 4, name, class_=f"name {series(place)}"))
    return chart(width, height, f"Validation loss over training tokens; at the end: {', '.join(names)}.", parts)


def _task(task: str, runs: Sequence[RunFiles], students: Sequence[Model | None]) -> dict[str, Any] | None:
    metric = main_metric([model for model in students if model], task)
    cells = []
    for files, model in zip(runs, students, strict=True):
        value = number(table(model.tasks.get(task)).get(metric)) if model else None
        teacher = files.model("teacher")
        whole = number(table(teacher.tasks.get(task)).get(metric)) if teacher else None
        kept = f" ({percent(value, whole)})" if value is not None and whole else ""
        cells.append(fixed(value) + kept)
    return {"task": task, "metric": metric, "cells": cells} if metric else None


def _cuts(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Sizes by axis: before and after of each run."""
    sizes = [(table((files.plan or {}).get("sizes_before")), table((files.plan or {}).get("sizes"))) for files in runs]
    axes = dict.fromkeys(axis for before, _ in sizes for axis in before if axis not in IMPLIED)
    rows = []
    for axis in axes:
        cells = [
            f"{count(before.get(axis))} → {count(after.get(axis))}" if before.get(axis) != after.get(axis)
            else count(before.get(axis))
            for before, after in sizes
        ]  # fmt: skip
        rows.append((AXES.get(axis, axis.replace("_", " ")), cells))
    return rows


def _speed(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Ratios to the original, where a run was measured."""
    ratios = [table(files.result("bench").get("ratio")) for files in runs]
    names = (("prefill", "reading"), ("decode", "generating"), ("peak_bytes", "largest memory"))
    rows = [
        (what, [f"{fixed(each.get(key), 2)} x" if number(each.get(key)) else NONE for each in ratios])
        for key, what in names
    ]
    return rows if any(ratios) else []
