"""A search with a measured budget: timings are taken once, kept, and reused when it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_chain import make_checkpoint, make_data

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.trainer import Trainer
from minitron_cli.importance.stage import run_importance
from minitron_cli.search.latency import Stopwatch
from minitron_cli.search.stage import run_search
from minitron_cli.shape import Shape


def test_timings_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second call nothing is measured, although the device would answer otherwise now."""
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    run_importance(ImportanceConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "imp", samples=8))
    config = SearchConfig(
        checkpoint=str(checkpoint), importance=tmp_path / "imp", data=data, out=tmp_path / "out", params="60%",
        tolerance="10%", grid=("hidden=24,36,48", "ffn=16,32,56", "layers=3,4"), finalists=1, rungs=1, steps=2,
        batch_size=4, candidates=4, eval_sequences=4, save_every=1, latency="3ms", device="cpu",
    )  # fmt: skip
    timed: list[str] = []

    def seconds(watch: Stopwatch, shape: Shape, context: int) -> float:
        timed.append(shape.label())
        return shape["layers"] / 1000

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    real = Trainer.update
    monkeypatch.setattr(Stopwatch, "_seconds_per_token", seconds)
    monkeypatch.setattr(Trainer, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        run_search(config)
    assert set(json.loads((tmp_path / "out.partial" / "timings.json").read_text())) == set(timed)
    assert any(name.startswith("4L") for name in timed)
    monkeypatch.setattr(Stopwatch, "_seconds_per_token", stop)
    monkeypatch.setattr(Trainer, "update", real)
    result = run_search(config)
    assert result.candidates and all(row["shape"]["layers"] == 3 for row in result.candidates)
    assert set(json.loads((tmp_path / "out" / "timings.json").read_text())) == set(timed)
    # Times are shown, and are no part of what another run would repeat.
    assert all(row["seconds_per_token"] == 0.003 for row in result.candidates)
    assert "milliseconds per token" in (tmp_path / "out" / "pareto.svg").read_text()
    assert "seconds" not in (tmp_path / "out" / "search.json").read_text().replace("measure-seconds", "")
