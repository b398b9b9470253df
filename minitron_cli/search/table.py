"""The candidates of a search as a table for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minitron_cli.runtime.table import Table, plain

Row = dict[str, Any]
ALWAYS = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")
"""Axes shown where the family has them; others only where candidates differ in them."""


def format_search(result: dict[str, Any]) -> str:
    """One line per candidate: rank and losses where they were measured, sizes, costs; then how orders agreed."""
    return plain(show_search(result))


def show_search(result: dict[str, Any]) -> list[str | Table]:
    """The same in parts."""
    rows: list[Row] = result["candidates"]
    columns = [column for column in _columns(rows) if any(text != "-" for text in column[1])]
    count = result["feasible"]
    lines: list[str | Table] = [
        f"{count:,} {'shape meets' if count == 1 else 'shapes meet'} the budgets; {len(rows):,} listed."
    ]
    cells = list(zip(*(texts for _, texts in columns), strict=True))
    chosen = [number for number, row in enumerate(rows) if row["rank"] == 1]
    lines.append(Table([title for title, _ in columns], cells, left=0, strong=chosen))
    lines += [_rung(rung) for rung in result["rungs"]]
    for size in result["sizes"]:
        lines += _choice(size, result["out"])
    if result["command"]:
        lines.append(f"This search again:\n  {result['command']}")
    return lines


def _rung(rung: Row) -> str:
    """How far the order after a rung agrees with the one before training and the one after the rung before."""
    of = f"{rung['size']}, " if rung["size"] else ""
    count = len(rung["candidates"])
    compared = [
        f"{rung[key]:+.2f} {words}"
        for key, words in (("tau_zero_shot", "with the zero-shot order"), ("tau_before", "with the rung before"))
        if rung[key] is not None
    ]
    tau = f": Kendall's tau {', '.join(compared)}" if compared else ""
    return f"{of}step {rung['step']}, {count} {'candidate' if count == 1 else 'candidates'}{tau}"


def _choice(size: Row, out: str | None) -> list[str]:
    of = f" for {size['size']}" if size["size"] else ""
    cut = f"`minitron prune CKPT --search {out}{_which(size)} --out DIR`"
    lines = [f"chosen{of}: {size['chosen']}; cut it with {cut}, or whatever becomes of this directory:"]
    if _which(size):
        source = "the original" if size["from"] == "original" else f"the distilled {size['from']}"
        lines = [f"chosen{of}: {size['chosen']}, to be cut from {source}:"]
    return lines + [f"  {command}" for command in size["commands"]]


def _which(size: Row) -> str:
    """How `prune --search` is told which one of a family."""
    return f" --params {size['size']}" if size["plan"] != "plan.json" else ""


def _columns(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """(title, cells); a cell of what was not measured is "-"."""
    whole: Callable[[Any], str] = lambda value: f"{value:,}"  # noqa: E731
    axes = [axis for axis in rows[0]["shape"] if axis in ALWAYS or len({row["shape"][axis] for row in rows}) > 1]
    columns = [("size", [_cell(row["size"], str) for row in rows])] if len({row["size"] for row in rows}) > 1 else []
    columns += [("rank", [_cell(row["rank"], str) for row in rows])]
    columns += [(axis, [str(row["shape"][axis]) for row in rows]) for axis in axes]
    columns += [("params", [whole(row["params"]) for row in rows])]
    columns += [("non-embedding", [whole(row["params_non_embedding"]) for row in rows])]
    if any(row["params_active"] != row["params"] for row in rows):
        columns += [("active", [whole(row["params_active"]) for row in rows])]
    giga: Callable[[Any], str] = lambda value: f"{value / 1e9:.4g}"  # noqa: E731
    columns += [
        ("weights GB", [giga(row["weight_bytes"]) for row in rows]),
        ("KV GB", [_cell(row["kv_bytes"], giga) for row in rows]),
        ("Gflop/token", [giga(row["flops_per_token"]) for row in rows]),
        ("ms/token", [_cell(row.get("seconds_per_token"), lambda value: f"{1e3 * value:.3g}") for row in rows]),
        ("zero-shot", [_cell(row["loss_zero_shot"], lambda value: f"{value:.3f}") for row in rows]),
        ("steps", [_cell(row.get("steps") or None, str) for row in rows]),
        ("retrained", [_cell(row["loss_retrained"], lambda value: f"{value:.3f}") for row in rows]),
    ]
    scored = [row for row in rows if row.get("score") is not None]
    if any(row["score"] != row["loss_retrained"] for row in scored):
        columns += [("score", [_cell(row.get("score"), lambda value: f"{value:.3f}") for row in rows])]
    return columns


def _cell(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)
