"""Results of `eval` as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_cli.evaluate.harness import is_error
from minitron_cli.evaluate.stage import EvalResult
from minitron_cli.runtime.table import Table, plain

Row = tuple[str, ...]


def format_eval(result: EvalResult) -> str:
    """One line of perplexity, then a table of tasks, members indented under their group; no final newline.

    perplexity 9.58  2.2601 nats/token  0.912 bits/byte  (65,408 tokens)

    task                    metric   value  +/-     questions  original    kept
    mmlu                    acc     0.2512  0.0123        114    0.2600  96.6 %
      mmlu_stem             acc     0.2456  0.0211         38    0.2500  98.2 %
    """
    return plain(show_eval(result))


def show_eval(result: EvalResult) -> list[str | Table]:
    """The same in parts."""
    parts: list[list[str | Table]] = []
    if result.loss is not None:
        parts.append([_loss_line(vars(result)), *map(_loss_line, result.against)])
    if result.tasks:
        members = {name for children in result.groups.values() for name in children}
        roots = [name for name in result.tasks if name not in members]
        header = ["task", "metric", "value", "+/-", "questions"]
        for other in result.against:
            header += [Path(other["checkpoint"]).name or other["checkpoint"], "kept"]
        rows = _rows(result, roots, 0)
        parts.append([Table(header, rows, left=2, strong=[at for at, row in enumerate(rows) if row[0] in roots])])
    if result.notes:
        parts.append([f"{name}: {note}" for name, note in result.notes.items()])
    return [line for number, part in enumerate(parts) for line in ([""] if number else []) + part]


def _loss_line(found: Mapping[str, Any]) -> str:
    line = (
        f"perplexity {found['perplexity']:.4g}  {found['loss']:.4f} nats/token  "
        f"{found['bits_per_byte']:.4f} bits/byte  ({found['tokens']:,} tokens)"
    )
    if "retention" not in found:
        return line
    return f"{line} of {found['checkpoint']}; bits/byte x {found['retention']['bits_per_byte']:.3f}"


def _rows(result: EvalResult, names: Sequence[str], depth: int) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        rows += _task_rows("  " * depth + name, name, result)
        rows += _rows(result, result.groups.get(name, []), depth + 1)
    return rows


def _task_rows(label: str, name: str, result: EvalResult) -> list[Row]:
    """One row per metric; the name only on the first."""
    metrics = result.tasks[name]
    count = f"{metrics['samples']:,.0f}" if "samples" in metrics else ""
    rows: list[Row] = []
    for metric, value in metrics.items():
        if metric == "samples" or is_error(metric):
            continue
        error = metrics.get(_error_name(metric))
        others: list[str] = []
        for other in result.against:
            kept = other["retention"]["tasks"][name][metric]
            others += [f"{other['tasks'][name][metric]:.4f}", "-" if kept is None else f"{100 * kept:.1f} %"]
        rows.append((label, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", count, *others))
        label = count = ""
    return rows or [(label, "", "", "", count, *[""] * (2 * len(result.against)))]  # a group without an average


def _error_name(metric: str) -> str:
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"
