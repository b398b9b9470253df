"""A family of sizes: one funnel, a choice of each size, and a chain of cuts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers_search import found, make_scored, search

from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.trainer import Teacher
from minitron_cli.errors import ConfigError
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.search.family import fits_inside, origins
from minitron_cli.search.stage import run_search
from minitron_cli.search.table import format_search
from minitron_cli.shape import Shape

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip


def shape(**changes: int) -> Shape:
    return Shape.of({**LLAMA, **changes})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("family")
    return {**make_scored(root), "params": "60%,80%", "finalists": 2}


@pytest.fixture(scope="module")
def done(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "search"
    search(settings, out)
    return out


def test_origins() -> None:
    """The nearest larger one that a shape fits inside, else a larger one, else the original."""
    chosen = {
        "8": shape(num_hidden_layers=7),
        "6": shape(num_hidden_layers=5, intermediate_size=112),
        "4": shape(num_hidden_layers=6, intermediate_size=64),  # more layers than 6 has
        "2": shape(num_hidden_layers=4, intermediate_size=64, hidden_size=48),
    }
    assert origins(chosen) == {"8": None, "6": "8", "4": "8", "2": "4"}
    wide = {"6": shape(hidden_size=48), "4": shape(num_hidden_layers=3)}
    assert origins(wide) == {"6": None, "4": None}


def test_what_fits_keeps_the_rules_of_the_class() -> None:
    """8 heads on 4 KV heads fit axis by axis into 8 on 8, whose groups have one head each; no cut makes that."""
    larger = shape(num_key_value_heads=8)
    assert fits_inside(shape(num_attention_heads=4), larger)
    assert not fits_inside(shape(), larger)


def test_all_sizes_share_one_funnel(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One teacher pass per step for both sizes; halving and ranks are each size's own, as in a search of its own."""
    lessons = [0]
    real = Teacher.lesson

    def counted(teacher: Teacher, batch: Any) -> Any:
        lessons[0] += 1
        return real(teacher, batch)

    monkeypatch.setattr(Teacher, "lesson", counted)
    result = search(settings, tmp_path / "both")
    assert lessons[0] == 4
    assert [size["size"] for size in result.sizes] == ["80%", "60%"] and result.chosen is None
    assert [len(rung["candidates"]) for rung in result.rungs] == [2, 2, 1, 1]
    for size in ("80%", "60%"):
        alone = search(settings, tmp_path / size, params=size)
        rows = [row for row in result.candidates if row["size"] == size]
        assert rows == alone.candidates and [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        assert alone.chosen is not None
        assert alone.chosen["name"] in [each["chosen"] for each in result.sizes if each["size"] == size]


def test_chain(settings: dict[str, Any], done: Path) -> None:
    """Commands: the larger one from the original, the smaller one from the larger one's student; one teacher."""
    lasting = json.loads((done / "search.json").read_text())
    larger, smaller = lasting["sizes"]
    assert (larger["from"], smaller["from"]) == ("original", "80%")
    cut, distilled = (shlex.split(command) for command in larger["commands"])
    assert cut[:3] == ["minitron", "prune", settings["checkpoint"]] and cut[-2:] == ["--out", "80pct-pruned"]
    assert distilled[2] == "80pct-pruned" and distilled[distilled.index("--teacher") + 1] == settings["checkpoint"]
    scored, cut, distilled = (shlex.split(command) for command in smaller["commands"])
    assert scored[:3] == ["minitron", "importance", "80pct"]
    assert cut[:5] == ["minitron", "prune", "80pct", "--importance", "80pct-importance"]
    assert distilled[distilled.index("--teacher") + 1] == settings["checkpoint"]
    names = {each["name"]: each["shape"] for each in lasting["candidates"]}
    asked = dict(zip(cut[5:-2:2], map(int, cut[6:-2:2]), strict=True))
    after = {**names[larger["chosen"]], **{axis.removeprefix("--"): size for axis, size in asked.items()}}
    assert after == names[smaller["chosen"]]
    shown = format_search({**lasting, "out": "out", "seconds": 0.0})
    assert "chosen for 60%" in shown and "to be cut from the distilled 80%" in shown


def test_prune_takes_one_of_several(settings: dict[str, Any], done: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"checkpoint": settings["checkpoint"], "search": done, "out": tmp_path / "cut"}
    with pytest.raises(ConfigError, match="each of 2 sizes; add one of --params 80%, --params 60%"):
        run_prune(PruneConfig(**common))
    with pytest.raises(ConfigError, match="no choice for --params 70%; it has 80%, 60%"):
        plan_prune(PruneConfig(**common, params="70%"))
    with pytest.raises(ConfigError, match="--params names one size of a --search"):
        PruneConfig(checkpoint="x", out=tmp_path, params="70%", hidden=8)
    assert not (tmp_path / "cut").exists() and not (tmp_path / "cut.partial").exists()
    sizes = {each["size"]: each["params"] for each in json.loads((done / "search.json").read_text())["sizes"]}
    for size, params in sizes.items():
        assert plan_prune(PruneConfig(**common, params=size)).params_after == params
    assert run_prune(PruneConfig(**common, params="60%")).params_after == sizes["60%"]


def test_list_shows_all_sizes(settings: dict[str, Any]) -> None:
    config = SearchConfig(checkpoint=settings["checkpoint"], params="60%,80%", tolerance="10%", grid=settings["grid"],
                          list=True)  # fmt: skip
    rows = run_search(config).candidates
    assert [row["size"] for row in rows] == sorted((row["size"] for row in rows), reverse=True)
    assert {row["size"] for row in rows} == {"60%", "80%"}


def test_same_bytes_again(settings: dict[str, Any], done: Path, tmp_path: Path) -> None:
    search(settings, tmp_path / "again")
    assert found(tmp_path / "again") == found(done)
