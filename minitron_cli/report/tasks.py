"""Tasks: every score as a table, and what each model keeps of the teacher's as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import NONE, fixed, number, percent
from minitron_cli.drawing.svg import CHARACTER, Scale, both, chart, el, line, marker, text, ticks
from minitron_cli.report.gather import Model, RunFiles

PREFERRED = ("exact_match", "acc_norm", "acc")
ROWS = 64
"""Tasks drawn at most; where there are more, only those that are in no group."""


def task_roots(files: RunFiles) -> list[tuple[str, str]]:
    """Tasks that are in no group, with the metric people quote of each."""
    members = {member for children in files.groups.values() for member in children}
    names = dict.fromkeys(task for model in files.models for task in model.tasks if task not in members)
    return [(task, metric) for task in names if (metric := main_metric(files.models, task))]


def main_metric(models: Sequence[Model], task: str) -> str:
    """`acc_norm` or `acc` where there is one, else the task's first metric."""
    metrics = [name for model in models for name in metric_names(model.tasks.get(task, {}))]
    preferred = [name for wanted in PREFERRED for name in metrics if name.partition(",")[0] == wanted]
    return (preferred or metrics or [""])[0]


def metric_names(metrics: Any) -> list[str]:
    """Metrics without their standard errors and the count of questions."""
    return [name for name in metrics if name != "samples" and not name.partition(",")[0].endswith("_stderr")]


def tasks(files: RunFiles) -> dict[str, Any] | None:
    """Every task, metric and model, and the chart; None where no task was run."""
    models = [model for model in files.models if model.tasks]
    names = dict.fromkeys(task for model in models for task in model.tasks)
    rows = []
    for task in names:
        for metric in dict.fromkeys(name for model in models for name in metric_names(model.tasks.get(task, {}))):
            cells = [_score(model.tasks.get(task, {}), metric) for model in models]
            rows.append({"task": task, "depth": depth(task, files.groups), "metric": metric, "cells": cells})
    if not rows:
        return None
    kept = retention(files)
    drawn = both(lambda width: retention_chart(kept, width)) if kept else None
    notes = sorted({f"{name}: {note}." for model in files.models for name, note in model.notes.items()})
    return {
        "models": [model.label for model in models],
        "rows": rows,
        "chart": drawn,
        "legend": _legend(files.models),
        "notes": notes,
    }


def _score(metrics: Any, metric: str) -> str:
    name, comma, kind = metric.partition(",")
    value, error = number(metrics.get(metric)), number(metrics.get(f"{name}_stderr{comma}{kind}"))
    if value is None:
        return NONE
    return fixed(value) + (f" ± {fixed(error)}" if error is not None else "")


def depth(task: str, groups: dict[str, list[str]]) -> int:
    """How many groups a task lies in (a circle of groups ends the count)."""
    found, seen = 0, {task}
    while (parent := next((name for name, members in groups.items() if task in members), None)) and parent not in seen:
        found, task = found + 1, parent
        seen.add(parent)
    return found


@dataclass(frozen=True)
class Kept:
    """One row of the chart: a task and its name without that of its group, how deep it lies in groups, its metric, and
    each model's share of the teacher's value.
    """

    task: str
    label: str
    depth: int
    metric: str
    teacher: float
    shares: list[tuple[Model, float]]


def retention(files: RunFiles) -> list[Kept]:
    """What the models keep of each task's main metric, without tasks that the teacher did not run or scores 0 in."""
    teacher = files.model("teacher")
    others = [model for model in files.models if model is not teacher and model.tasks]
    if teacher is None or not others:
        return []
    rows = []
    for task in teacher.tasks:
        metric = main_metric(files.models, task)
        reference = number(teacher.tasks[task].get(metric))
        found = [(model, number(model.tasks.get(task, {}).get(metric))) for model in others]
        shares = [(model, value / reference) for model, value in found if value is not None and reference]
        if shares and reference:
            group = next((name for name, members in files.groups.items() if task in members), "")
            label = task.removeprefix(f"{group.partition('_')[0]}_") if group else task
            rows.append(Kept(task, label, depth(task, files.groups), metric, reference, shares))
    return rows if len(rows) <= ROWS else [row for row in rows if not row.depth]


def retention_chart(rows: Sequence[Kept], width: int) -> Markup:
    """One row per task, one mark per model: its share of the teacher's value. The line is the teacher."""
    pitch, top = 24.0, 22.0
    names = [_cut("  " * row.depth + row.label, 24 if width < 500 else 52) for row in rows]
    left = min(width * 0.5, 16 + CHARACTER * max(len(name) for name in names))
    shares = [share for row in rows for _, share in row.shares] + [1.0]
    marks, _ = ticks(min(shares), max(shares), 4 if width < 500 else 7)
    x = Scale(marks[0], marks[-1], left + 8, width - 20.0)
    bottom = top + len(rows) * pitch
    parts = []
    for tick in marks:
        parts.append(line(x(tick), top, x(tick), bottom, "axis" if abs(tick - 1) < 1e-9 else "grid"))
        parts.append(text(x(tick), bottom + 16, f"{100 * tick:.0f} %", anchor="middle"))
    parts.append(line(x(1.0), top - 4, x(1.0), bottom, "stroke teacher dashed"))
    parts.append(text(x(1.0), top - 8, "teacher", anchor="middle", class_="name teacher"))
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + (place + 0.5) * pitch
        parts.append(text(8 + 10 * row.depth, y + 4, name.strip(), class_=None if row.depth else "value"))
        ends = [x(share) for _, share in row.shares]
        parts.append(line(min(ends), y, max(ends), y, "grid"))
        for model, share in row.shares:
            tip = f"{model.label}: {100 * share:.1f} % of {fixed(row.teacher)} ({row.task}, {row.metric})"
            parts.append(marker(model.name, x(share), y, f"fill {model.name}", tip, 5.0))
    parts.append(text((left + width) / 2, bottom + 34, "share of the teacher's value", anchor="middle", class_="unit"))
    told = "; ".join(
        f"{row.task} {', '.join(f'{model.label} {100 * share:.1f} %' for model, share in row.shares)}" for row in rows
    )
    return chart(width, bottom + 42, f"Share of the teacher's value by task: {told}.", parts)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _legend(models: Sequence[Model]) -> Markup:
    """Which mark is which model."""
    swatches = []
    for model in models:
        if model.tasks and model.name != "teacher":
            mark = el("svg", marker(model.name, 0, 0, f"fill {model.name}", size=5.0), viewBox="-8 -8 16 16",
                      aria_hidden="true")  # fmt: skip
            swatches.append(el("span", mark + model.label))
    return el("p", Markup("").join(swatches), class_="legend")


def kept_sentence(files: RunFiles, student: Model) -> str:
    """`It keeps 97.1 % of mmlu (acc).` of the tasks in no group, or nothing."""
    rows = [row for row in retention(files) if not row.depth]
    told = [
        f"{percent(share, 1.0)} of {row.task} ({row.metric})"
        for row in rows
        for model, share in row.shares
        if model is student
    ]
    return f"It keeps {', '.join(told[:4])}." if told else ""
