"""What the template shows of training, cuts and search."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from minitron_cli.drawing.format import NONE, count, fixed, number, percent
from minitron_cli.drawing.svg import WIDE, both
from minitron_cli.report import charts
from minitron_cli.report.gather import Curve, RunFiles, records, removed_layers, table
from minitron_cli.report.network import network
from minitron_cli.shape import SHOWN

AXES = {
    "layers": "layers",
    "hidden": "hidden channels",
    "ffn": "FFN neurons",
    "heads": "query heads",
    "kv_heads": "KV heads",
    "head_dim": "channels per head",
    "vocab": "vocabulary",
    "experts": "experts",
    "expert_ffn": "neurons per expert",
    "expert_latent": "latent channels of experts",
    "mamba_groups": "Mamba groups",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "channels per Mamba head",
    "mamba_state": "Mamba state",
    "linear_key_heads": "key heads of linear attention",
    "linear_value_heads": "value heads of linear attention",
    "linear_key_dim": "channels per key head",
    "linear_value_dim": "channels per value head",
}
IMPLIED = {"group", "v_head_dim", "mamba_group", "linear_group"}
"""Axes that follow from others."""

CANDIDATES = 12
"""Rows of the search table that show without opening it."""


def training(files: RunFiles) -> dict[str, Any] | None:
    """Validation and training losses over tokens."""
    curves = [curve for curve in files.curves if np.isfinite(curve.loss).any()]
    if not curves:
        return None
    teacher = files.model("teacher")
    validated = [curve for curve in curves if curve.validation]
    reference = teacher.loss if teacher is not None else None
    drawn = both(lambda width: charts.validation_chart(validated, reference, width)) if validated else None
    small = []
    for curve in curves:
        limits = charts.training_limits([other for other in curves if other.kind == curve.kind])
        small.append({"label": curve.label, "chart": charts.training_chart(curve, limits)})
    spans = " or ".join(dict.fromkeys(count(charts.window(curve)) for curve in curves if charts.window(curve) > 1))
    notes = [charts.starts_above(validated, reference) if validated else "", _subset(files)]
    return {
        "validation": drawn,
        "small": small,
        "points": _points(validated),
        "note": " ".join(note for note in notes if note),
        "smoothing": f"Strong lines are means of {spans} steps; pale ones are single steps." if spans else "",
    }


def _points(curves: list[Curve]) -> dict[str, Any]:
    """The validation losses as a table, at most 40 rows."""
    tokens = sorted({tokens for curve in curves for tokens, _ in curve.validation})
    if len(tokens) > 40:
        tokens = [tokens[index] for index in np.unique(np.linspace(0, len(tokens) - 1, 40).round().astype(int))]
    values = [dict(curve.validation) for curve in curves]
    rows = [[count(at), *(fixed(value.get(at)) for value in values)] for at in tokens]
    return {"labels": [curve.label for curve in curves], "rows": rows}


def _subset(files: RunFiles) -> str:
    """Say it where the curves were measured on fewer sequences than the table."""
    splits = table(files.result("data").get("splits"))
    whole = number(table(splits.get("validation")).get("sequences"))
    part = next((number(files.config(curve.name).get("eval_sequences")) for curve in files.curves), None)
    if whole is None or part is None or part >= whole:
        return ""
    asked = [number(files.config(f"eval/{model.name}").get("max_sequences")) for model in files.models]
    if asked and set(asked) == {part}:
        return f"The curves and the table above use the first {count(part)} of {count(whole)} validation sequences."
    return (
        f"The curves use the first {count(part)} of {count(whole)} validation sequences; the teacher's line and the "
        "table above use those of the evaluation, so the ends differ from the table."
    )


def cuts(files: RunFiles) -> dict[str, Any] | None:
    """Sizes before and after per axis, and the layers."""
    before, after = (table((files.plan or {}).get(key)) for key in ("sizes_before", "sizes"))
    if not before or not after:
        return None
    order = [*(name for name in SHOWN if name in before), *(name for name in before if name not in SHOWN)]
    rows = [
        _cut(AXES.get(name, name.replace("_", " ")), before[name], after.get(name))
        for name in order
        if name not in IMPLIED
    ]
    rows = [row for row in rows if row is not None]
    teacher, pruned = files.model("teacher"), files.model("pruned") or files.model("student")
    totals: list[tuple[str, Any, Any]] = []
    if files.plan is not None:
        totals.append(("parameters", files.plan.get("params_before"), files.plan.get("params_after")))
    if teacher is not None and pruned is not None:
        totals.append(("non-embedding parameters", teacher.non_embedding, pruned.non_embedding))
    ends = [row for row in (_cut(*total) for total in totals) if row is not None]
    gone = removed_layers(files)
    layers = [{"number": layer, "gone": layer in gone} for layer in range(int(before.get("layers") or 0))]
    ranked = str((files.plan or {}).get("ranked_by") or "")
    sizes = [{name: size for name, value in found.items() if (size := number(value)) is not None}
             for found in (before, after)]  # fmt: skip
    drawn = network(sizes[0], sizes[1], gone, WIDE)
    return {
        "network": both(lambda width: network(sizes[0], sizes[1], gone, width) or Markup("")) if drawn else None,
        "rows": rows,
        "totals": ends,
        "layers": layers,
        "gone": gone,
        "ranked": ranked.split(" ")[0] if ranked else "",
    }


def _cut(label: str, before: Any, after: Any) -> dict[str, Any] | None:
    old, new = number(before), number(after)
    if not old or new is None:
        return None
    share = percent(new, old)
    width = f"{100 * new / old:.1f}%"
    return {
        "label": label,
        "before": count(old),
        "after": count(new),
        "share": share,
        "width": width,
        "same": old == new,
    }


def search(files: RunFiles) -> dict[str, Any] | None:
    """Candidates as a table and a chart."""
    found = records((files.search or {}).get("candidates"))
    if files.search is None or not found:
        return None
    key = "params_non_embedding" if files.config("search").get("count") == "non-embedding" else "params"
    unit = "non-embedding parameters" if key == "params_non_embedding" else "parameters"
    chosen = table(files.search.get("chosen")).get("name")
    dots = [_dot(row, key, chosen) for row in found if number(row.get(key)) is not None]
    measured = [dot for dot in dots if dot.zero_shot is not None or dot.retrained is not None]
    drawn = both(lambda width: charts.search_chart(measured, unit, width)) if measured else None
    axes = [name for name in SHOWN if len({table(row.get("shape")).get(name) for row in found}) > 1]
    rows = [_candidate(row, axes, chosen) for row in found]
    return {
        "chart": drawn,
        "axes": [AXES.get(name, name) for name in axes],
        "rows": rows[:CANDIDATES],
        "more": rows[CANDIDATES:],
        "feasible": count(files.search.get("feasible")),
        "measured": count(len(measured)),
        "retrained": count(sum(dot.retrained is not None for dot in measured)),
        "chosen": chosen,
    }


def _dot(row: dict[str, Any], key: str, chosen: Any) -> charts.Dot:
    losses = (number(row.get("loss_zero_shot")), number(row.get("loss_retrained")))
    name = str(row.get("name"))
    return charts.Dot(str(row.get("rank") or ""), name, number(row.get(key)) or 0.0, *losses, name == chosen)


def _candidate(row: dict[str, Any], axes: list[str], chosen: Any) -> dict[str, Any]:
    cells = [count(table(row.get("shape")).get(name)) for name in axes]
    cells += [count(row.get("params")), count(row.get("params_non_embedding"))]
    cells += [fixed(row.get("loss_zero_shot")), fixed(row.get("loss_retrained"))]
    return {
        "rank": row.get("rank") or NONE,
        "name": row.get("name"),
        "cells": cells,
        "chosen": row.get("name") == chosen,
    }
