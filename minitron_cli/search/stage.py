"""The search stage: enumerate, measure zero-shot, distil the best few briefly, choose."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.search import SearchConfig
from minitron_cli.importance.layout import Scores
from minitron_cli.importance.store import load_scores
from minitron_cli.manifest import StageOutput, fingerprint, require_disk, write_json
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.prune.plan import make_plan
from minitron_cli.runtime.device import pick_device
from minitron_cli.runtime.progress import say
from minitron_cli.search.enumerate import Candidate, spread
from minitron_cli.search.latency import Stopwatch
from minitron_cli.search.listing import SearchResult, feasible, row, run_list
from minitron_cli.search.measure import Funnel
from minitron_cli.tokens import TokenDataset

TIMINGS = "timings.json"
"""Measured seconds per token: the one part of a search that another run would not repeat."""


def run_search(config: SearchConfig) -> SearchResult:
    """Choose a shape within budgets (Minitron, section 6).

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: training diverged.
    """
    began = time.monotonic()
    if config.list:
        return run_list(config)
    assert config.importance is not None and config.data is not None and config.out is not None
    checkpoint = Checkpoint(resolve(config.checkpoint))
    _ = checkpoint.declared
    found = feasible(config, checkpoint.shape)
    source = fingerprint(checkpoint.path)
    scores, ranked_by = _scores(config, checkpoint, source, spread(found, config.candidates))
    dataset = TokenDataset(config.data)
    dataset.split("train"), dataset.split("validation")
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    pick_device(config.device)
    inputs = {"checkpoint": source, "importance": fingerprint(config.importance), "data": fingerprint(config.data)}
    output = StageOutput(config.out, "search", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return SearchResult(**output.result)
    seconds: dict[str, float] = {}
    if config.timed:
        found, seconds = _fast(config, found, output.partial / TIMINGS if output.resuming else None)
    measured = spread(found, config.candidates)
    if config.timed:
        scores, ranked_by = _scores(config, checkpoint, source, measured)
    require_disk(config.out, checkpoint.shape.params * 12 * 2 * max(config.finalists, 1), "The search state")
    say(f"{len(found)} shapes meet the budgets; measuring {len(measured)}.")
    with output:
        if config.timed:
            write_json(output.partial / TIMINGS, seconds)
        plans = {
            candidate.name: make_plan(checkpoint.shape, scores, candidate.target, ranked_by=ranked_by)
            for candidate in measured
        }
        funnel = Funnel(config, checkpoint, dataset, plans, output.partial)
        funnel.run()
        rows = rank([_row(candidate, config, funnel.zero_shot, funnel.retrained) for candidate in measured])
        best = rows[0]
        write_json(output.partial / "plan.json", plans[best["name"]].to_json())
        result = SearchResult(str(config.out), len(found), rows, best, round(time.monotonic() - began, 3))
        write_json(output.partial / "candidates.json", result.to_json())
        output.commit(result.to_json())
    return result


def _scores(
    config: SearchConfig, checkpoint: Checkpoint, source: str, candidates: list[Candidate]
) -> tuple[Scores, str]:
    """Scores that can rank the layers of these candidates, and what ranked them."""
    assert config.importance is not None
    removed = {checkpoint.shape["layers"] - candidate.shape["layers"] for candidate in candidates}
    return load_scores(config.importance, checkpoint.shape, source, config.layer_score, removed)


def _fast(config: SearchConfig, found: list[Candidate], saved: Path | None) -> tuple[list[Candidate], dict[str, float]]:
    """Candidates that are fast enough, and all timings; those of an interrupted run hold, so that it goes on alike."""
    known = json.loads(saved.read_text("utf-8")) if saved is not None and saved.exists() else {}
    watch = Stopwatch(config, known)
    return watch.keep_fast(found), watch.seconds


def _row(
    candidate: Candidate, config: SearchConfig, zero_shot: dict[str, float], retrained: dict[str, float]
) -> dict[str, Any]:
    name = candidate.name
    return row(candidate, config) | {"loss_zero_shot": zero_shot.get(name), "loss_retrained": retrained.get(name)}


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first: retrained candidates by that loss, then the others by their zero-shot loss."""
    order = sorted(
        rows,
        key=lambda row: (row["loss_retrained"] is None, row["loss_retrained"] or row["loss_zero_shot"], row["name"]),
    )
    return [{**row, "rank": number} for number, row in enumerate(order, 1)]
