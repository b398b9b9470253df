"""From depth scores to the layers that leave: task scores, runs, greedy orders, and which cuts they are good for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_chain import make_checkpoint, make_data
from helpers_eval import make_checkpoint as make_answering
from helpers_eval import make_mmlu
from safetensors.numpy import load_file

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.evaluate.harness import TaskSet, build_tasks, find_local, headline, run_tasks
from minitron_cli.importance.removal import score_removals
from minitron_cli.importance.stage import run_importance
from minitron_cli.importance.store import _ranks
from minitron_cli.models.streaming import ResidentModel
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune.stage import plan_prune
from minitron_cli.report.gather import RunFiles
from minitron_cli.report.scores import importance as importance_section
from minitron_cli.search.stage import run_search
from minitron_cli.tokens import Split

CPU = torch.device("cpu")
TASK = "mmlu_anatomy"


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of four layers and the task's files."""
    folder = tmp_path_factory.mktemp("task")
    path = make_answering(folder / "model", num_hidden_layers=4, hidden_size=24, intermediate_size=32)
    return path, make_mmlu(folder / "mmlu", ["anatomy"])


def by_task(answering: tuple[Path, Path], directory: Path, **changes: Any) -> dict[str, np.ndarray]:
    path, folder = answering
    options = {"loss_samples": 0, "depth_metric": "task", "depth_task": TASK, "depth_task_dir": folder, **changes}
    config = ImportanceConfig(checkpoint=str(path), data=path, out=path / "out", **options)
    directory.mkdir(exist_ok=True)
    model = ResidentModel(Checkpoint(path), device=CPU, dtype=torch.float32)
    split = Split("train", np.random.default_rng(0).integers(0, 256, (2, 8)), None, 1.0)
    return score_removals(model, split, [0, 1], config, directory)


def accuracy(answering: tuple[Path, Path], gone: set[int]) -> float:
    """Of a model that really lacks the layers."""
    path, folder = answering
    model = ResidentModel(Checkpoint(path), device=CPU, dtype=torch.float32).model
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in gone]
    model.model.layers = torch.nn.ModuleList(kept)
    tasks = build_tasks([TASK], num_fewshot=None, local=find_local([TASK], folder))
    metrics, _ = run_tasks(tasks, model, load_tokenizer(path), batch_size=8)
    return metrics[TASK]["acc"]


def test_task_scores(answering: tuple[Path, Path], tmp_path: Path) -> None:
    whole = accuracy(answering, set())
    single = by_task(answering, tmp_path / "single")
    assert single["full.task"].tolist() == [pytest.approx(whole)]
    expected = [whole - accuracy(answering, {layer}) for layer in range(4)]
    assert len(set(expected)) > 1
    np.testing.assert_allclose(single["layers.task"], expected)
    blocks = by_task(answering, tmp_path / "block", depth="block", remove=3, loss_samples=2)
    np.testing.assert_allclose(
        blocks["blocks.task"], [whole - accuracy(answering, gone) for gone in ({0, 1, 2}, {1, 2, 3})]
    )
    assert blocks["blocks.loss"].shape == (2,)


def test_greedy_by_task_continues(
    answering: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of each round leaves; after a kill, what was answered is not asked again."""
    found = by_task(answering, tmp_path / "a", depth="greedy", remove=2, loss_samples=2)
    losses = by_task(answering, tmp_path / "b", loss_samples=2)
    tied = losses["layers.task"] == losses["layers.task"].min()
    assert found["greedy.loss"][0] == losses["layers.loss"][tied].min()
    gone: set[int] = set()
    whole = accuracy(answering, gone)
    for layer, drop in zip(found["greedy.order"].astype(int), found["greedy.task"], strict=True):
        drops = {left: whole - accuracy(answering, gone | {left}) for left in range(4) if left not in gone}
        assert drop == pytest.approx(drops[layer]) and drop == pytest.approx(min(drops.values()))
        gone.add(int(layer))
    assert found["greedy.loss"].shape == (2,)

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("minitron_cli.importance.tasks.run_tasks", never)
    again = by_task(answering, tmp_path / "a", depth="greedy", remove=2, loss_samples=2)
    assert all(np.array_equal(again[name], found[name]) for name in found)


def test_headline_is_the_first_metric() -> None:
    asked = TaskSet(roots=["first", "second"])
    metrics = {"first": {"samples": 3, "acc_norm_stderr": 0.1, "acc_norm": 0.5, "acc": 0.4}, "second": {"acc": 0.25}}
    assert headline(asked, metrics) == 0.375


def test_an_unknown_task_is_refused_first(answering: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="serves mmlu"):
        by_task(answering, tmp_path, depth_task="lambada_openai")
    with pytest.raises(InputError, match="no file for winogrande"):
        by_task(answering, tmp_path, depth_task="winogrande")
    with pytest.raises(InputError, match="lacks"):
        by_task(answering, tmp_path, depth_task="mmlu_virology")


def test_the_report_shows_every_depth_score() -> None:
    """Bars of each measure by layer, by run, and in the order in which layers leave."""
    values = np.array([0.5, 0.25, 0.125])
    named = {f"{kind}.{measure}": values for kind in ("layers", "blocks", "greedy") for measure in ("loss", "task")}
    named |= {"greedy.order": np.array([4.0, 2.0, 7.0]), "layers.bi": values}
    files = RunFiles(
        **{field.name: None for field in dataclasses.fields(RunFiles)} | {"scores": named, "manifests": {}}
    )
    section = importance_section(files)
    assert section is not None
    titles = [figure["title"] for figure in section["figures"]]
    assert titles[:4] == [
        "Block importance",
        "Loss increase without the layer",
        "Loss increase without a run of layers",
        "Loss increase as layers leave in turn",
    ]
    assert len(titles) == 7
    assert "layer 4 0.500, layer 2 0.250, layer 7 0.125" in str(section["figures"][3]["chart"])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("chain")
    checkpoint = make_checkpoint(folder / "model")
    return checkpoint, make_data(folder / "data", checkpoint)


def importance(chain: tuple[Path, Path], out: Path, **options: Any) -> dict[str, np.ndarray]:
    run_importance(ImportanceConfig(checkpoint=str(chain[0]), data=chain[1], out=out, samples=4, **options))
    return load_file(out / "scores.safetensors")


def gone_after(chain: tuple[Path, Path], out: Path, layers: int, **options: Any) -> tuple[list[int], str]:
    config = PruneConfig(
        checkpoint=str(chain[0]), importance=out, layers=layers, out=out / "x", width_score="activation", **options
    )
    plan = plan_prune(config)
    return [layer for layer in range(4) if layer not in plan.layers], plan.ranked_by


def test_runs_leave_whole(chain: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "i"
    found = importance(chain, out, depth="block", remove=2, depth_metric="kl")
    first = int(found["blocks.kl"].argmin())
    assert gone_after(chain, out, 2) == (
        [first, first + 1],
        f"importance {out}, layers by block removal, KL of the logits",
    )
    assert gone_after(chain, out, 2, layer_score="block") == gone_after(chain, out, 2)
    least = [int(found["layers.bi"].argmin())]
    assert gone_after(chain, out, 3) == (least, f"importance {out}, layers by block importance")
    assert gone_after(chain, out, 4) == ([], f"importance {out}")
    with pytest.raises(InputError, match=r"runs of 2 layers, but the cut removes 1; .* --depth block --remove 1"):
        gone_after(chain, out, 3, layer_score="block")
    with pytest.raises(InputError, match=r"no loss layer scores.*--depth single"):
        gone_after(chain, out, 3, layer_score="loss")


def test_greedy_order_serves_smaller_cuts(chain: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "i"
    order = importance(chain, out, depth="greedy", remove=2)["greedy.order"].astype(int).tolist()
    named = f"importance {out}, layers by greedy removal, loss increase"
    assert gone_after(chain, out, 3) == (order[:1], named)
    assert gone_after(chain, out, 2) == (sorted(order), named)
    assert gone_after(chain, out, 1)[1].endswith("block importance")
    with pytest.raises(InputError, match="order of length 2, but the cut removes 3"):
        gone_after(chain, out, 1, layer_score="greedy")


@pytest.mark.parametrize("metric", ["loss", "kl", "mse"])
def test_single_layers_by_a_measure(chain: tuple[Path, Path], tmp_path: Path, metric: str) -> None:
    out = tmp_path / "i"
    values = importance(chain, out, depth_metric=metric)[f"layers.{metric}"]
    gone, named = gone_after(chain, out, 2)
    assert gone == sorted(np.argsort(values)[:2].tolist())
    assert gone_after(chain, out, 2, layer_score=metric) == (gone, named)
    with pytest.raises(InputError, match=r"no greedy layer scores.*--depth greedy and --remove"):
        gone_after(chain, out, 2, layer_score="greedy")


def test_ties_of_a_task_go_by_the_loss() -> None:
    stored = {"layers.task": np.array([0.1, 0.0, 0.0, 0.1]), "layers.loss": np.array([1.0, 3.0, 2.0, 0.0])}
    assert _ranks(stored, 4, "task", "task").tolist() == [3, 1, 0, 2]
    runs = {"blocks.task": np.array([0.0, 0.0, 0.1]), "blocks.loss": np.array([2.0, 1.0, 0.0])}
    assert _ranks(runs, 4, "block", "task").tolist() == [1, 0, 0, 1]


def test_search_uses_an_order_that_fits_all_candidates(chain: tuple[Path, Path], tmp_path: Path) -> None:
    importance(chain, tmp_path / "i", depth="greedy", remove=1)
    common: dict[str, Any] = {"checkpoint": str(chain[0]), "importance": tmp_path / "i", "data": chain[1]}
    common |= {"finalists": 0, "eval_sequences": 2, "layer_score": "greedy", "params_range": "1%:100%"}
    with pytest.raises(InputError, match="greedy order of length 1, but the cut removes 2"):
        run_search(SearchConfig(**common, grid=("layers=2,3",), out=tmp_path / "a"))
    result = run_search(SearchConfig(**common, grid=("layers=3",), out=tmp_path / "b"))
    assert result.chosen is not None and result.chosen["shape"]["layers"] == 3
