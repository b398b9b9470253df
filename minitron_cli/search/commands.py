"""Command lines that repeat a search or carry out its choice."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from minitron_cli.config.base import command_line
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.prune.plan import PrunePlan

OUT = "DIR"
"""Stands for a directory that is the user's to choose."""


def search_command(config: SearchConfig) -> str:
    """The search itself."""
    return command_line("search", config)


def prune_command(config: SearchConfig, plan: PrunePlan, target: Mapping[str, int]) -> str | None:
    """The cut with explicit sizes, whatever a search would say; None where an axis has no option of its own."""
    known = {field.name for field in dataclasses.fields(PruneConfig)}
    if not target.keys() <= known:
        return None
    assert config.out is not None
    gone = [layer for layer in range(plan.sizes_before["layers"]) if layer not in plan.layers]
    sizes: dict[str, Any] = {axis: size for axis, size in target.items() if axis != "layers"}
    cut = PruneConfig(
        checkpoint=config.checkpoint, importance=config.importance, drop_layers=tuple(gone), out=config.out, **sizes
    )
    return command_line("prune", cut)


def chain_commands(
    config: SearchConfig, size: str, origin: str | None, plan: PrunePlan, target: Mapping[str, int]
) -> list[str]:
    """Score, cut and distil one size of a family; `origin` is the size whose student is cut, None for the original."""
    name, teacher = _folder(size), config.teacher or config.checkpoint
    if origin is None:
        cut = prune_command(config, plan, target)
        chosen = ["minitron", "prune", config.checkpoint, "--search", OUT, "--params", size]
        steps = [cut.removesuffix(OUT) if cut else shlex.join([*chosen, "--out"]) + " "]
        steps[0] += f"{name}-pruned"
    else:
        student, scores = _folder(origin), f"{_folder(origin)}-importance"
        sizes = [part for axis, value in target.items() for part in (f"--{axis.replace('_', '-')}", str(value))]
        steps = [
            shlex.join(["minitron", "importance", student, "--data", str(config.data), "--out", scores]),
            shlex.join(["minitron", "prune", student, "--importance", scores, *sizes, "--out", f"{name}-pruned"]),
        ]
    distill = ["minitron", "distill", f"{name}-pruned", "--teacher", teacher, "--data", str(config.data)]
    return [*steps, shlex.join([*distill, "--tokens", "N", "--out", name])]


def _folder(size: str) -> str:
    return size.replace("%", "pct")
