"""A tiny scored model and searches over it that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers_chain import make_checkpoint, make_data

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.importance.stage import run_importance
from minitron_cli.search.listing import SearchResult
from minitron_cli.search.stage import run_search

GRID = ("hidden=24,36,48", "ffn=16,32,56", "layers=2,3,4")


def make_scored(root: Path) -> dict[str, Any]:
    """Options of a search over a tiny model: four candidates, two rungs of 2 and 4 steps."""
    checkpoint = make_checkpoint(root / "model")
    data = make_data(root / "data", checkpoint)
    run_importance(ImportanceConfig(checkpoint=str(checkpoint), data=data, out=root / "imp", samples=8))
    return {
        "checkpoint": str(checkpoint), "importance": root / "imp", "data": data, "params": "60%", "tolerance": "10%",
        "grid": GRID, "finalists": 4, "rungs": 2, "steps": 4, "batch_size": 4, "candidates": 4, "eval_sequences": 4,
        "save_every": 1, "eval_every": 3, "lr": 1e-3,
    }  # fmt: skip


def search(settings: dict[str, Any], out: Path, **changes: Any) -> SearchResult:
    """One search."""
    return run_search(SearchConfig(**{**settings, **changes}, out=out))


def found(out: Path) -> bytes:
    """What every run of the same search must repeat."""
    return (out / "search.json").read_bytes() + (out / "curves.json").read_bytes()
