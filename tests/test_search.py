"""Budgets, enumeration against the paper's tables, and the funnel on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_chain import make_checkpoint, make_data

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.trainer import Trainer
from minitron_cli.errors import ConfigError
from minitron_cli.importance.stage import run_importance
from minitron_cli.prune.stage import run_prune
from minitron_cli.search.budget import read_params, window
from minitron_cli.search.stage import rank, run_search

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4B", 4_000_000_000), ("350M", 350_000_000), ("50%", 500), ("1_234", 1234), ("7.8e9", 7.8e9)],
)
def test_read_params(text: str, expected: float) -> None:
    assert read_params(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "B", "-4B", "0", "four", "5%%"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read_params(text, 1000)


def test_window() -> None:
    assert window("4B", "5%", None, 1) == (3_800_000_000, 4_200_000_000)
    assert window(None, "5%", "45%:50%", 1000) == (450, 500)
    with pytest.raises(ConfigError, match="empty"):
        window(None, "5%", "50%:45%", 1000)


def test_list_needs_config_json_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = SearchConfig(checkpoint=str(tmp_path), params="4.5B", grid=("hidden=3072", "ffn=9216"), list=True)
    (row,) = run_search(config).candidates
    assert row["params"] == 4_512_746_496 and row["loss_zero_shot"] is None and row["shape"]["layers"] == 32


def test_rank_prefers_the_retrained_loss() -> None:
    rows = [
        {"name": "a", "loss_zero_shot": 1.0, "loss_retrained": None},
        {"name": "b", "loss_zero_shot": 3.0, "loss_retrained": 2.0},
        {"name": "c", "loss_zero_shot": 2.0, "loss_retrained": 2.5},
    ]
    assert [(row["name"], row["rank"]) for row in rank(rows)] == [("b", 1), ("c", 2), ("a", 3)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A tiny scored model and a search over it that takes a second."""
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    run_importance(ImportanceConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "imp", samples=8))
    return {
        "checkpoint": str(checkpoint), "importance": tmp_path / "imp", "data": data, "params": "60%",
        "tolerance": "10%", "grid": ("hidden=24,36,48", "ffn=16,32,56", "layers=3,4"), "finalists": 2, "steps": 3,
        "batch_size": 4, "candidates": 4, "eval_sequences": 4, "save_every": 1,
    }  # fmt: skip


@pytest.mark.parametrize("calls", [1, 4])
def test_an_interrupted_search_ends_as_an_undisturbed_one(
    settings: dict[str, Any], calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first or a later step of the short distillation, run again: the same losses, the same plan."""
    undisturbed = run_search(SearchConfig(**settings, out=tmp_path / "whole"))
    real, count = Trainer.update, [0]

    def stopping(*arguments: Any) -> float:
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Trainer, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_search(SearchConfig(**settings, out=tmp_path / "again"))
    assert (tmp_path / "again.partial" / "state.safetensors").exists()
    monkeypatch.setattr(Trainer, "update", real)
    assert run_search(SearchConfig(**settings, out=tmp_path / "again")).candidates == undisturbed.candidates
    assert (tmp_path / "again" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def test_funnel_end_to_end(settings: dict[str, Any], tmp_path: Path) -> None:
    """Zero-shot for all, short distillation for two, a plan that prune executes to the promised size; then reuse."""
    config = SearchConfig(**settings, out=tmp_path / "search")
    result = run_search(config)
    assert len(result.candidates) == 4
    assert sum(row["loss_retrained"] is not None for row in result.candidates) == 2
    assert all(row["loss_zero_shot"] > 0 for row in result.candidates)
    assert result.chosen == result.candidates[0] and result.chosen["rank"] == 1
    pruned = run_prune(
        PruneConfig(checkpoint=settings["checkpoint"], search=tmp_path / "search", out=tmp_path / "pruned")
    )
    assert pruned.params_after == result.chosen["params"]
    assert run_search(config).candidates == result.candidates
