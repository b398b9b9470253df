"""The result of a bench as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_cli.runtime.progress import byte_size
from minitron_cli.runtime.table import Table, plain

TITLES = (
    "batch",
    "context",
    "model",
    "prefill tok/s",
    "decode tok/s",
    "first token",
    "p50",
    "p99",
    "memory",
    "KV cache",
)


def format_bench(result: dict[str, Any]) -> str:
    """A header, one line per case and checkpoint, and their ratios."""
    return plain(show_bench(result))


def show_bench(result: dict[str, Any]) -> list[str | Table]:
    """The same in parts."""
    names = [Path(result["checkpoint"]).name or result["checkpoint"]]
    if result["against"] is not None:
        names.append(Path(result["against"]).name or result["against"])
    if len(set(names)) == 1 < len(names):
        names = [result["checkpoint"], result["against"]]
    sizes = [f"{name}: {model['params']:,} parameters, {byte_size(model['weight_bytes'])} of weights, "
             f"{byte_size(model['kv_bytes_per_token'])} of KV cache per token ({model['shape']})"
             for name, model in zip(names, result["models"], strict=True)]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for case in result["cases"]:
        keys = ("checkpoint", "against") if "against" in case else ("checkpoint",)
        for name, key in zip(names, keys, strict=True):
            place = (str(case["batch_size"]), f"{case['context']:,}") if key == "checkpoint" else ("", "")
            rows.append((*place, name, *_cells(case[key])))
        if "ratio" in case:
            rows.append(("", "", "ratio", *_ratios(case["ratio"])))
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    turns = f"medians of {result['rounds']} rounds" + (", taking turns" if len(names) > 1 else "")
    head = f"{result['device']}, {result['dtype']}{threads}; {turns}; transformers, greedy"
    tail = [f"{result['out']}: bench.json, bench.svg"] if result["out"] else []
    ratios = [number for number, row in enumerate(rows) if row[2] == "ratio"]
    return [*sizes, head, Table(TITLES, rows, left=3, strong=ratios), *tail]


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{found['prefill_tokens_per_second']:,.0f}",
        f"{found['decode_tokens_per_second']:,.1f}",
        _time(found["time_to_first_token"]),
        _time(found["token_p50"]),
        _time(found["token_p99"]),
        byte_size(found["peak_bytes"]),
        byte_size(found["kv_bytes"]),
    )


def _ratios(ratio: dict[str, float]) -> tuple[str, ...]:
    speeds = [
        f"{ratio[name]:.2f}x ({ratio[f'{name}_low']:.2f}-{ratio[f'{name}_high']:.2f})" for name in ("prefill", "decode")
    ]
    others = ("time_to_first_token", "token_p50", "token_p99", "peak_bytes", "kv_bytes")
    return (*speeds, *(f"{ratio[name]:.2f}x" for name in others))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
