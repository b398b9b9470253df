"""Results of `eval` as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minitron_cli.evaluate.stage import EvalResult

Row = tuple[str, str, str, str, str]


def format_eval(result: EvalResult) -> str:
    """One line of perplexity, then a table of tasks, members indented under their group; no final newline.

    perplexity 9.58  2.2601 nats/token  0.912 bits/byte  (65,408 tokens)

    task                    metric   value  +/-     questions
    mmlu                    acc     0.2512  0.0123        114
      mmlu_stem             acc     0.2456  0.0211         38
    """
    parts = []
    if result.loss is not None:
        parts.append(
            f"perplexity {result.perplexity:.4g}  {result.loss:.4f} nats/token  "
            f"{result.bits_per_byte:.4f} bits/byte  ({result.tokens:,} tokens)"
        )
    if result.tasks:
        members = {name for children in result.groups.values() for name in children}
        roots = [name for name in result.tasks if name not in members]
        parts.append(_align([("task", "metric", "value", "+/-", "questions"), *_rows(result, roots, 0)]))
    if result.notes:
        parts.append("\n".join(f"{name}: {note}" for name, note in result.notes.items()))
    return "\n\n".join(parts)


def _rows(result: EvalResult, names: Sequence[str], depth: int) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        rows += _task_rows("  " * depth + name, result.tasks[name])
        rows += _rows(result, result.groups.get(name, []), depth + 1)
    return rows


def _task_rows(label: str, metrics: Mapping[str, float]) -> list[Row]:
    """One row per metric; the name only on the first."""
    count = f"{metrics['samples']:,.0f}" if "samples" in metrics else ""
    rows: list[Row] = []
    for metric, value in metrics.items():
        if metric == "samples" or _is_error(metric):
            continue
        error = metrics.get(_error_name(metric))
        rows.append((label, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", count))
        label = count = ""
    return rows or [(label, "", "", "", count)]  # a group without an average of its own


def _error_name(metric: str) -> str:
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def _is_error(metric: str) -> bool:
    return metric.partition(",")[0].endswith("_stderr")


def _align(rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell; texts left, numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
