"""Which shapes a search is about, from config.json alone; imports torch only where speed is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import read_config
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, FamilyError
from minitron_cli.search.budget import KV_ELEMENT_BYTES, make_budgets
from minitron_cli.search.enumerate import Candidate, enumerate_candidates, usable_grid
from minitron_cli.search.grid import AUTO, read_cuts, read_grid
from minitron_cli.search.space import Space
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class SearchResult:
    """Every candidate with what was measured (None where not), best first, and the chosen shape's name.

    Keys of `--json`.
    """

    out: str | None
    feasible: int
    candidates: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def feasible(config: SearchConfig, shape: Shape) -> list[Candidate]:
    """All candidates that meet the closed-form budgets, most parameters first.

    Raises:
        UserError: a budget or the grid cannot be read, or nothing is feasible.
    """
    if shape.family.draft:
        raise FamilyError(f"{shape.family.name} can be inspected but not pruned yet, so there is nothing to search.")
    cuts = read_cuts(config.max_cut)
    # With --list or any --grid, axes that are not named stay as they are.
    entries = config.grid or (() if config.list and not cuts else (AUTO,))
    if cuts and not any(entry.strip().endswith(AUTO) for entry in entries):
        raise ConfigError("--max-cut limits automatic grids, and no --grid is automatic; add --grid auto or AXIS=auto.")
    space = Space(shape, usable_grid(shape, read_grid(entries, shape, cuts)))
    return enumerate_candidates(space, make_budgets(config, shape, space.costs))


def run_list(config: SearchConfig) -> SearchResult:
    """`search --list`: all candidates, none left out for being dominated.

    Raises:
        UserError: as `feasible`; nothing is ever written.
    """
    found = feasible(config, Shape.of(read_config(resolve(config.checkpoint, config_only=True))))
    seconds: Mapping[str, float] = {}
    if config.timed:
        from minitron_cli.search.latency import Stopwatch

        watch = Stopwatch(config)
        found, seconds = watch.keep_fast(found), watch.seconds
    rows = [row(candidate, config) | {"seconds_per_token": seconds.get(candidate.name)} for candidate in found]
    return SearchResult(None, len(found), rows, None, 0.0)


def row(candidate: Candidate, config: SearchConfig) -> dict[str, Any]:
    """A candidate's entry: its shape and closed-form costs, and nothing measured yet."""
    shape = candidate.shape
    bits = config.weight_bits or shape.dtype_bytes() * 8
    return {
        "name": candidate.name,
        "shape": shape.shown(),
        "params": shape.params,
        "params_non_embedding": shape.params_non_embedding,
        "params_active": shape.params_active,
        "weight_bytes": round(shape.params * bits / 8),
        "kv_bytes": shape.kv_bytes(config.context, KV_ELEMENT_BYTES) if config.context else None,
        "flops_per_token": shape.flops_per_token(config.context or 0),
        "loss_zero_shot": None,
        "loss_retrained": None,
        "rank": None,
    }
