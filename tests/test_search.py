"""Sizes and windows, what a search writes, and what it refuses before any work."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers_chain import make_checkpoint
from helpers_search import make_scored, search

from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.recipe import Recipe
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, InputError, ResourceError, UserError
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.runtime import memory
from minitron_cli.search import course, measure
from minitron_cli.search.budget import read_params, window
from minitron_cli.search.commands import search_command
from minitron_cli.search.pareto import Dot, front
from minitron_cli.search.stage import run_search
from minitron_cli.search.table import format_search

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


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_scored(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def done(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search that trained three of four candidates."""
    out = tmp_path_factory.mktemp("done") / "search"
    search(settings, out, finalists=3, context=16)
    return out


def test_what_a_search_finds(settings: dict[str, Any], done: Path) -> None:
    """Four measured, three distilled to step 2, two of them to step 4, ranks that follow; the same again is done."""
    result = search(settings, done, finalists=3, context=16)
    rows = result.candidates
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert [row["steps"] for row in rows] == [4, 4, 2, 0]
    assert rows[0]["score"] == rows[0]["loss_retrained"] <= rows[1]["loss_retrained"]
    assert rows[3]["loss_retrained"] is None and all(row["loss_zero_shot"] > 0 for row in rows)
    assert sorted(row["rank_zero_shot"] for row in rows) == [1, 2, 3, 4]
    assert [point["step"] for point in rows[0]["curve"]] == [0, 2, 3, 4]
    assert [point["tokens"] for point in rows[0]["curve"]] == [0, 128, 192, 256]
    assert result.chosen == rows[0]
    assert [(rung["step"], len(rung["candidates"])) for rung in result.rungs] == [(2, 3), (4, 2)]
    assert result.rungs[0]["tau_before"] is None and abs(result.rungs[1]["tau_before"]) == 1
    shown = format_search(result.to_json())
    assert "Kendall's tau" in shown and str(result.command) in shown
    assert not list(done.glob("state.*"))


def test_search_json_tells_what_another_run_repeats(done: Path) -> None:
    lasting = json.loads((done / "search.json").read_text())
    assert lasting.keys() >= {"candidates", "chosen", "sizes", "rungs", "rank", "feasible", "command"}
    assert lasting.keys().isdisjoint({"out", "seconds"}) and str(done) not in json.dumps(lasting)
    assert lasting["chosen"].keys() >= {"shape", "params", "loss_zero_shot", "loss_retrained", "rank"}
    curves = json.loads((done / "curves.json").read_text())
    assert {len(curve["loss"]) for curve in curves.values()} == {2, 4}


def test_prune_takes_the_choice_and_the_command_repeats_it(
    settings: dict[str, Any], done: Path, tmp_path: Path
) -> None:
    lasting = json.loads((done / "search.json").read_text())
    pruned = run_prune(PruneConfig(checkpoint=settings["checkpoint"], search=done, out=tmp_path / "pruned"))
    assert pruned.params_after == lasting["chosen"]["params"]
    chosen = plan_prune(PruneConfig(checkpoint=settings["checkpoint"], search=done, out=tmp_path / "again"))
    explicit = plan_prune(parsed(lasting["sizes"][0]["commands"][0], tmp_path))
    # The same units stay; only the words say that a search knew which layers to name.
    assert replace(explicit, ranked_by=chosen.ranked_by) == chosen


def parsed(command: str, out: Path) -> PruneConfig:
    """A prune command's configuration."""
    program, stage, checkpoint, *options = shlex.split(command)
    assert (program, stage, options[-2:]) == ("minitron", "prune", ["--out", "DIR"])
    names = [name.removeprefix("--").replace("-", "_") for name in options[:-2:2]]
    return PruneConfig(checkpoint=checkpoint, out=out, **dict(zip(names, options[1:-2:2], strict=True)))


def test_search_command(settings: dict[str, Any]) -> None:
    config = SearchConfig(**settings, max_cut=("40%", "layers=50%"), out=Path("somewhere"), force=True)
    words = shlex.split(search_command(config))
    assert words[:3] == ["minitron", "search", settings["checkpoint"]] and words[-2:] == ["--out", "DIR"]
    assert words.count("--grid") == 3 and words[words.index("--max-cut") + 1] == "40%,layers=50%"
    assert "--force" not in words and "--rank" not in words and words[words.index("--steps") + 1] == "4"


def test_picture(done: Path) -> None:
    """Two panels, five dots' titles per panel at least, no measured time."""
    text = (done / "pareto.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == 2
    assert "kB of weights and KV cache" in text and "milliseconds" not in text


def test_front() -> None:
    dots = [Dot(name, cost, (loss,), True, "") for name, cost, loss in (
        ("a", 1, 3.0), ("b", 2, 3.5), ("c", 3, 2.0), ("d", 3, 2.5), ("e", 4, 2.0), ("f", 5, 1.0),
    )]  # fmt: skip
    assert [dot.name for dot in front(dots)] == ["a", "c", "f"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4, "tokens": 100}, "--steps or --tokens"),
        ({"rungs": 4}, "--rungs 4 halve 4 training steps to less than one; give 8 steps or more, or --rungs 3"),
        ({"tokens": 64, "steps": None}, "--rungs 2 halve 1 training steps"),
        ({"rank": "loss+"}, "--rank loss"),
        ({"rank": "0*loss"}, "weight '0' is not a positive number"),
        ({"rank": "loss+2*loss"}, "has loss twice"),
        ({"rank": "loss+nosuchtask"}, "no task 'nosuchtask'"),
        ({"rank": "kl", "finalists": 0}, "--finalists above 0"),
        ({"rank": "kl", "cache_teacher": Path("cache")}, "leave out --cache-teacher"),
        ({"rank": "kl", "loss": "ce"}, "leave out --loss ce"),
        ({"task_limit": 3}, "--task-limit goes with a task"),
        ({"batch_size": 4, "micro_batch": 3}, "not a multiple"),
        ({"loss": "kll"}, "did you mean 'kl'"),
        ({"params": "60%,58%"}, "60% and 58% have shapes in common within --tolerance 10%"),
        ({"params": "60%,9%"}, "--params 9%: none of the 27 points"),
        ({"params": "0.1%"}, "the nearest has"),
        ({"grid": ("heads=4",)}, "can be in no shape"),
    ],
)
def test_refused_before_any_work(
    settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        search(settings, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_importance_of_another_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="scores another checkpoint"):
        search({**settings, "checkpoint": str(other)}, tmp_path / "out")


def test_more_finalists_than_candidates(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search(settings, tmp_path / "out", finalists=9, candidates=2, rungs=1, steps=1)
    assert sum(row["loss_retrained"] is not None for row in result.candidates) == 2
    said = capsys.readouterr().err
    assert "--finalists 9: there are only 2 candidates" in said
    assert "students are trained on 128, the teacher reads 64 once for all of a group" in said


def test_no_room_for_a_single_candidate(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the options that would help; a search that trains nothing is not."""
    for module in (memory, measure, course):
        monkeypatch.setattr(module, "available_bytes", lambda device: 400_000)
    monkeypatch.setattr("minitron_cli.distill.memory.available_bytes", lambda device: 400_000)
    with pytest.raises(ResourceError, match="--checkpoint-activations"):
        search(settings, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_recipe_has_one_size_per_round() -> None:
    sections: dict[str, Any] = {"data": {"sources": ["x"]}, "importance": {}}
    with pytest.raises(ConfigError, match="each size a round of its own"):
        Recipe(name="r", teacher="t", search={"params": "60%,40%"}, **sections)
