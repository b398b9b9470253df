"""The search stage: enumerate, measure zero-shot, distil the best few briefly, choose."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint, read_config
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import FamilyError
from minitron_cli.importance.store import load_scores
from minitron_cli.manifest import StageOutput, fingerprint, require_disk, write_json
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.prune.plan import make_plan
from minitron_cli.runtime.device import pick_device
from minitron_cli.runtime.progress import say
from minitron_cli.search.budget import read_grid, window
from minitron_cli.search.enumerate import Candidate, automatic_grid, enumerate_candidates, spread
from minitron_cli.search.measure import Funnel
from minitron_cli.shape import Shape
from minitron_cli.tokens import TokenDataset


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
    """All candidates in the window.

    Raises:
        UserError: the window or the grid cannot be read, or nothing is feasible.
    """
    if shape.family.draft:
        raise FamilyError(f"{shape.family.name} can be inspected but not pruned yet, so there is nothing to search.")
    total = shape.params if config.count == "total" else shape.params_non_embedding
    low, high = window(config.params, config.tolerance, config.params_range, total)
    grid = read_grid(config.grid, shape.sizes)
    # With --list or any --grid, axes that are not named stay as they are.
    return enumerate_candidates(shape, grid if grid or config.list else automatic_grid(shape), low, high, config.count)


def run_search(config: SearchConfig) -> SearchResult:
    """Choose a shape under a parameter budget (Minitron, section 6).

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: training diverged.
    """
    began = time.monotonic()
    if config.list:
        found = feasible(config, Shape.of(read_config(resolve(config.checkpoint, config_only=True))))
        return SearchResult(None, len(found), [_row(candidate) for candidate in found], None, 0.0)
    assert config.importance is not None and config.data is not None and config.out is not None
    checkpoint = Checkpoint(resolve(config.checkpoint))
    _ = checkpoint.declared
    found = feasible(config, checkpoint.shape)
    source = fingerprint(checkpoint.path)
    measured = spread(found, config.candidates)
    removed = {checkpoint.shape["layers"] - candidate.shape["layers"] for candidate in measured}
    scores, ranked_by = load_scores(config.importance, checkpoint.shape, source, config.layer_score, removed)
    dataset = TokenDataset(config.data)
    dataset.split("train"), dataset.split("validation")
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    pick_device(config.device)
    inputs = {"checkpoint": source, "importance": fingerprint(config.importance), "data": fingerprint(config.data)}
    output = StageOutput(config.out, "search", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return SearchResult(**output.result)
    require_disk(config.out, checkpoint.shape.params * 12 * 2 * max(config.finalists, 1), "The search state")
    say(f"{len(found)} shapes fit the window; measuring {len(measured)}.")
    with output:
        plans = {
            candidate.name: make_plan(checkpoint.shape, scores, candidate.target, ranked_by=ranked_by)
            for candidate in measured
        }
        funnel = Funnel(config, checkpoint, dataset, plans, output.partial)
        funnel.run()
        rows = rank([_row(candidate, funnel.zero_shot, funnel.retrained) for candidate in measured])
        best = rows[0]
        write_json(output.partial / "plan.json", plans[best["name"]].to_json())
        result = SearchResult(str(config.out), len(found), rows, best, round(time.monotonic() - began, 3))
        write_json(output.partial / "candidates.json", result.to_json())
        output.commit(result.to_json())
    return result


def _row(
    candidate: Candidate, zero_shot: dict[str, float] | None = None, retrained: dict[str, float] | None = None
) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "shape": candidate.shape.shown(),
        "params": candidate.shape.params,
        "params_non_embedding": candidate.shape.params_non_embedding,
        "loss_zero_shot": (zero_shot or {}).get(candidate.name),
        "loss_retrained": (retrained or {}).get(candidate.name),
        "rank": None,
    }


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first: retrained candidates by that loss, then the others by their zero-shot loss."""
    order = sorted(
        rows,
        key=lambda row: (row["loss_retrained"] is None, row["loss_retrained"] or row["loss_zero_shot"], row["name"]),
    )
    return [{**row, "rank": number} for number, row in enumerate(order, 1)]
