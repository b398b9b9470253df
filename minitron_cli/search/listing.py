"""Which shapes a search is about, from config.json alone; imports torch only where speed is measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import read_config
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, FamilyError
from minitron_cli.runtime.progress import say
from minitron_cli.search.budget import KV_ELEMENT_BYTES, Budget, make_budgets
from minitron_cli.search.cost import Remaining
from minitron_cli.search.enumerate import Candidate, enumerate_candidates, usable_grid
from minitron_cli.search.grid import AUTO, read_cuts, read_grid
from minitron_cli.search.space import Space
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class SearchResult:
    """Every candidate with what was measured (None where not), best first, largest size first; keys of `--json`.

    `chosen` is the choice where one size was asked for; `sizes` has the choice of every size, what it is pruned from
    in a chain, and the commands. `rungs` are what halving compared, `command` repeats the search.
    """

    out: str | None
    feasible: int
    candidates: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    seconds: float
    rank: str = "loss"
    sizes: list[dict[str, Any]] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


Ranked = Callable[[set[int]], Remaining]
"""Numbers of layers that may stay, to what stays in each case."""


def feasible(config: SearchConfig, shape: Shape, ranked: Ranked | None = None) -> dict[str | None, list[Candidate]]:
    """All candidates that meet the closed-form budgets, by size of --params, largest first; most parameters first.

    Args:
        ranked: which layers stay; the first ones, where that is not known.

    Raises:
        UserError: a budget or the grid cannot be read, windows of sizes overlap, or nothing is feasible.
    """
    if shape.family.draft:
        raise FamilyError(f"{shape.family.name} can be inspected but not pruned yet, so there is nothing to search.")
    cuts = read_cuts(config.max_cut)
    # With --list or any --grid, axes that are not named stay as they are.
    entries = config.grid or (() if config.list and not cuts else (AUTO,))
    if cuts and not any(entry.strip().endswith(AUTO) for entry in entries):
        raise ConfigError("--max-cut limits automatic grids, and no --grid is automatic; add --grid auto or AXIS=auto.")
    grid = usable_grid(shape, read_grid(entries, shape, cuts))
    counts = {int(entry) for entry in grid["layers"].entries} if "layers" in grid else set()
    remaining: Remaining = range
    if ranked is not None:
        remaining = ranked(counts)
    elif counts - {shape["layers"]} and shape.layers_differ:
        say("Layers of this model differ, and nothing ranks them here: the last ones are counted as those that leave.")
    space = Space(shape, grid, remaining)
    budgets = {size: make_budgets(replace(config, params=size), shape, space.costs) for size in config.sizes}
    order = _largest_first(config, budgets) if len(budgets) > 1 else list(budgets)
    return {size: enumerate_candidates(space, budgets[size]) for size in order}


def _largest_first(config: SearchConfig, budgets: Mapping[str | None, list[Budget]]) -> list[str | None]:
    """The sizes of a family in order.

    Raises:
        ConfigError: two have shapes in common.
    """
    windows = {size: (limits[0].low, limits[0].high) for size, limits in budgets.items()}
    order = sorted(windows, key=lambda size: -windows[size][0])
    for larger, smaller in itertools.pairwise(order):
        if windows[smaller][1] >= windows[larger][0]:
            raise ConfigError(
                f"--params {larger} and {smaller} have shapes in common within --tolerance {config.tolerance}; choose "
                "sizes further apart, or a smaller --tolerance."
            )
    return order


def run_list(config: SearchConfig) -> SearchResult:
    """`search --list`: all candidates, none left out for being dominated.

    Raises:
        UserError: as `feasible`; nothing is ever written.
    """
    found = feasible(config, Shape.of(read_config(resolve(config.checkpoint, config_only=True))))
    seconds: Mapping[str, float] = {}
    if config.timed:
        found, seconds = fast(config, found, {})
    rows = [
        row(candidate, config, size) | {"seconds_per_token": seconds.get(candidate.name)}
        for size, candidates in found.items()
        for candidate in candidates
    ]
    return SearchResult(None, len(rows), rows, None, 0.0)


def fast(
    config: SearchConfig, found: Mapping[str | None, list[Candidate]], known: Mapping[str, float]
) -> tuple[dict[str | None, list[Candidate]], dict[str, float]]:
    """The candidates that meet the measured budgets, and the seconds per token of all; imports torch.

    Args:
        known: seconds measured before.
    """
    from minitron_cli.search.latency import Stopwatch

    watch = Stopwatch(config, known)
    return {size: watch.keep_fast(candidates) for size, candidates in found.items()}, watch.seconds


def row(candidate: Candidate, config: SearchConfig, size: str | None) -> dict[str, Any]:
    """A candidate's entry: its shape and closed-form costs, and nothing measured yet."""
    shape = candidate.shape
    bits = config.weight_bits or shape.dtype_bytes() * 8
    return {
        "name": candidate.name,
        "size": size,
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
