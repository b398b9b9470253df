"""Speed and memory as bars: what `bench` measured, the two checkpoints in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from minitron_cli.drawing.format import count, fixed, number
from minitron_cli.drawing.svg import NARROW, Scale, chart, el, text
from minitron_cli.report.gather import RunFiles, records, table
from minitron_cli.runtime.progress import byte_size

BAR, GAP = 15.0, 10.0
KEYS = {"checkpoint": "student", "against": "teacher"}
"""The two sides of a case, and the colours they have in the other charts."""


def _milliseconds(value: float) -> str:
    return f"{fixed(1e3 * value, 1)} ms"


def _rate(value: float) -> str:
    return count(value) if value >= 100 else fixed(value, 1)


Panel = tuple[str, str, str, Callable[[float], str]]
"""Key in a case's numbers, key in its ratios, title, and how a value is written."""

PANELS: tuple[Panel, ...] = (
    ("prefill_tokens_per_second", "prefill", "Reading prompts, tokens per second", _rate),
    ("decode_tokens_per_second", "decode", "Generating, tokens per second", _rate),
    ("time_to_first_token", "time_to_first_token", "Time to the first token", _milliseconds),
    ("peak_bytes", "peak_bytes", "Largest memory", byte_size),
    ("kv_bytes", "kv_bytes", "KV cache", byte_size),
)


def speed(files: RunFiles) -> dict[str, Any] | None:
    """Bars, and everything as a table; None where nothing was measured."""
    result = files.result("bench")
    cases = [case for case in records(result.get("cases")) if table(case.get("checkpoint"))]
    if not cases:
        return None
    names = {key: Path(str(result[key])).name or str(result[key]) for key in KEYS if result.get(key)}
    models = records(result.get("models"))
    threads = f", {result.get('threads')} threads" if result.get("device") == "cpu" else ""
    return {
        "names": [(KEYS[key], name) for key, name in names.items()],
        "panels": [
            {"title": panel[2], "chart": bars(cases, names, panel)} for panel in PANELS if _has(cases, panel[0])
        ],
        "models": [
            (name, count(model.get("params")), byte_size(model["weight_bytes"]), byte_size(model["kv_bytes_per_token"]))
            for name, model in zip(names.values(), models, strict=False)
            if number(model.get("weight_bytes")) is not None and number(model.get("kv_bytes_per_token")) is not None
        ],
        "rows": [row for case in cases for row in _rows(case, names)],
        "where": f"{result.get('device')}, {result.get('dtype')}{threads}; medians of {result.get('rounds')} rounds"
        + (", the two taking turns; ratios are medians of the rounds' own" if len(names) > 1 else ""),
    }  # fmt: skip


def _has(cases: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(number(table(case["checkpoint"]).get(key)) for case in cases)


def bars(cases: Sequence[Mapping[str, Any]], names: Mapping[str, str], panel: Panel) -> Markup:
    """One measure: per case a bar for each checkpoint, with the ratio behind ours."""
    key, ratio, title, written = panel
    values = [number(table(case.get(name)).get(key)) or 0.0 for case in cases for name in names]
    x, y = Scale(0, max(values), 0.0, NARROW - 120.0), 0.0
    parts: list[Markup] = []
    told = []
    for case in cases:
        place = f"batch {case.get('batch_size')}, context {count(case.get('context'))}"
        parts.append(text(0, y + 12, place))
        y += 18
        for name in names:
            value = number(table(case.get(name)).get(key)) or 0.0
            found = number(table(case.get("ratio")).get(ratio)) if name == "checkpoint" else None
            shown = written(value) + (f"  ({found:.2f} x)" if found is not None else "")
            tip = el("title", f"{names[name]}, {place}: {shown}")
            wide = max(x(value), 1.0)
            parts.append(el("rect", tip, x=0.0, y=y + 1, width=wide, height=BAR - 2, class_=f"fill {KEYS[name]}"))
            parts.append(text(wide + 6, y + BAR - 3.5, shown, class_="value"))
            told.append(f"{names[name]} {shown} at {place}")
            y += BAR
        y += GAP
    return chart(NARROW, y, f"{title}: {'; '.join(told)}.", parts)


def _rows(case: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    rows = []
    for key, name in names.items():
        found = table(case.get(key))
        times = [number(found.get(each)) for each in ("time_to_first_token", "token_p50", "token_p90", "token_p99")]
        rows.append([
            name, count(case.get("batch_size")), count(case.get("context")),
            *(_rate(number(found.get(f"{rate}_tokens_per_second")) or 0.0) for rate in ("prefill", "decode")),
            *(_milliseconds(value or 0.0) for value in times),
            *(byte_size(number(found.get(size)) or 0.0) for size in ("peak_bytes", "kv_bytes")),
        ])  # fmt: skip
    return rows


def speed_sentence(files: RunFiles) -> str:
    """What the first case says in one sentence, or nothing."""
    ratio = table(files.result("bench").get("ratio"))
    decode, peak = number(ratio.get("decode")), number(ratio.get("peak_bytes"))
    if decode is None:
        return ""
    memory = f", with {fixed(peak, 2)} x its peak memory" if peak else ""
    return f"On this machine it generates {fixed(decode, 2)} x as fast as the original{memory}."
