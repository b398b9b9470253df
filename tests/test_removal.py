"""Depth scores against plain forward passes of the stock model with layers skipped."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import ConfigError, InputError, RunError, ShapeError
from minitron_cli.importance import measure
from minitron_cli.importance.compare import compare
from minitron_cli.importance.paths import FULL, before, legs, runs
from minitron_cli.importance.removal import score_removals
from minitron_cli.models.load import load_model
from minitron_cli.models.streaming import ResidentModel, StreamedModel
from minitron_cli.models.taps import place_taps, skipped_layer
from minitron_cli.runtime.group import Group
from minitron_cli.tokens import Split

CPU = torch.device("cpu")
ROWS = [7, 2, 5, 0, 3]
SIZE = 2


def make_split(vocab: int = 67) -> Split:
    """Eight sequences of 12 random ids; about two thirds of the tokens are targets."""
    random = np.random.default_rng(3)
    tokens = random.integers(3, vocab, (8, 12)).astype(np.uint16)
    return Split("train", tokens, (random.random((8, 12)) < 0.65).astype(np.uint8), 1.0)


def config_for(path: Path, **changes: Any) -> ImportanceConfig:
    return ImportanceConfig(checkpoint=str(path), data=path, out=path / "out", batch_size=SIZE, **changes)


def scored(
    path: Path,
    directory: Path,
    *,
    streamed: bool = False,
    rows: list[int] = ROWS,
    group: Group | None = None,
    **changes: Any,
) -> dict[str, np.ndarray]:
    kind = StreamedModel if streamed else ResidentModel
    model = kind(Checkpoint(path), device=CPU, dtype=torch.float32)
    directory.mkdir(exist_ok=True)
    return score_removals(model, make_split(), rows, config_for(path, **changes), directory, group)


def reference(path: Path, removed: list[frozenset[int]]) -> dict[str, np.ndarray]:
    """The same measures from whole logits, in fp64 sums, one plain forward pass of the stock class per path."""
    model = load_model(path, device=CPU, dtype=torch.float32)
    split, blocks = make_split(), list(place_taps(model, Checkpoint(path).shape, ("block",)))
    ids = torch.from_numpy(split.rows(ROWS))
    chosen = torch.from_numpy(split.targets(ROWS)[:, 1:])

    def run(path: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with ExitStack() as stack, torch.inference_mode():
            for block in blocks:
                if block.layer in path:
                    stack.enter_context(skipped_layer(block))
            logits = model(ids, use_cache=False).logits[:, :-1][chosen]
            states = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1][chosen]
        return logits.double().log_softmax(-1), states.double()

    whole, states = run(FULL)
    targets = ids[:, 1:][chosen][:, None]
    found: dict[str, list[float]] = {"loss": [], "kl": [], "mse": []}
    for each in removed:
        other, there = run(each)
        found["loss"].append(float((whole - other).gather(1, targets).mean()))
        found["kl"].append(float((whole.exp() * (whole - other)).sum(-1).mean()))
        found["mse"].append(float((there - states).square().mean() / states.square().mean()))
    return {name: np.array(values) for name, values in found.items()}


def assert_measures(scores: dict[str, np.ndarray], name: str, expected: dict[str, np.ndarray]) -> None:
    for kind, values in expected.items():
        np.testing.assert_allclose(scores[f"{name}.{kind}"], values, rtol=1e-4, atol=5e-7, err_msg=kind)


@pytest.mark.parametrize("family", TINY)
def test_single_layers_of_a_family(family: str, tmp_path: Path) -> None:
    """In memory and streamed with two legs, against the stock class."""
    path = make_model(tmp_path / "model", family)
    expected = reference(path, runs(4, 1))
    assert all(np.abs(values).min() > 1e-5 for values in expected.values())
    assert_measures(scored(path, tmp_path / "a"), "layers", expected)
    hidden = Checkpoint(path).shape["hidden"]
    two = 4 * len(ROWS) * 12 * hidden * 4
    assert_measures(scored(path, tmp_path / "b", streamed=True, carry_bytes=two), "layers", expected)


@pytest.mark.parametrize("family", ["falcon", "gemma3_text", "opt-post_norm"])
@pytest.mark.parametrize("streamed", [False, True])
def test_blocks(family: str, streamed: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", family)
    found = scored(path, tmp_path / "a", streamed=streamed, depth="block", remove=2)
    assert_measures(found, "blocks", reference(path, runs(4, 2)))
    assert found["blocks.loss"].shape == (3,)


@pytest.mark.parametrize("metric", ["loss", "kl", "mse"])
def test_greedy(metric: str, tmp_path: Path) -> None:
    """Against a greedy search by plain forward passes; in memory, streamed, and a leg per path."""
    path = make_model(tmp_path / "model", "falcon")
    removed, order, rounds = FULL, [], []
    for _ in range(3):
        left = [layer for layer in range(4) if layer not in removed]
        harm = reference(path, [removed | {layer} for layer in left])
        best = int(harm[metric].argmin())
        removed |= {left[best]}
        order.append(left[best])
        rounds.append({name: values[best] for name, values in harm.items()})
    expected = {name: np.array([each[name] for each in rounds]) for name in rounds[0]}
    options = {"depth": "greedy", "remove": 3, "depth_metric": metric}
    for number, changes in enumerate(({}, {"streamed": True}, {"streamed": True, "carry_bytes": 1})):
        found = scored(path, tmp_path / str(number), **options, **changes)
        assert found["greedy.order"].tolist() == order
        assert_measures(found, "greedy", expected)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", [{}, {"depth": "block", "remove": 2}, {"depth": "greedy", "remove": 3}])
def test_grouping_changes_no_bit(llama: Path, tmp_path: Path, streamed: bool, options: dict[str, Any]) -> None:
    whole = scored(llama, tmp_path / "all", **options)
    for paths in (1, 2, 3):
        carried = (paths + 2) * (len(ROWS) if streamed else SIZE) * 12 * 48 * 4
        found = scored(llama, tmp_path / str(paths), streamed=streamed, carry_bytes=carried, **options)
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_the_model_is_read_once_per_leg(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two legs: the first reads every layer, the second begins where its first path leaves the whole model."""
    read: list[int] = []
    loaded = StreamedModel.loaded
    monkeypatch.setattr(StreamedModel, "loaded", lambda self, number: read.append(number) or loaded(self, number))
    scored(llama, tmp_path / "a", streamed=True, carry_bytes=4 * len(ROWS) * 12 * 48 * 4)
    assert read == [0, 1, 2, 3, 2, 3]
    assert "4 paths, 2 carried at a time" in (said := capsys.readouterr().err)
    assert "the model is read 2 times (6 layers; it has 4)" in said


@given(st.integers(2, 9), st.integers(1, 9), st.sets(st.integers(0, 8)), st.data())
def test_legs_cover_every_path_once(layers: int, together: int, base: set[int], data: st.DataObject) -> None:
    """All that a leg needs is there: each past has a forerunner, each start was kept by the leg before."""
    trunk = frozenset(layer for layer in base if layer < layers - 1)
    left = [layer for layer in range(layers) if layer not in trunk]
    count = data.draw(st.integers(1, len(left))) if not trunk else 1
    paths = [trunk | {layer} for layer in left] if count == 1 else runs(layers, count)
    plan = legs(paths, trunk, together)
    assert [path for leg in plan for path in leg.paths if path] == paths
    assert [leg.start for leg in plan[1:]] == [leg.keep for leg in plan[:-1]] and plan[-1].keep is None
    for leg in plan:
        present = {before(trunk, leg.start)}
        assert len(leg.paths) <= together + (leg is plan[0])
        for layer in range(leg.start, layers):
            assert leg.keep != layer or before(trunk, layer) in present
            for history in leg.histories(layer + 1):
                assert history - {layer} in present
            present = set(leg.histories(layer + 1))
        assert present == set(leg.paths)


def test_single_layers_cost_half(llama: Path) -> None:
    """One leg of L paths runs L(L+1)/2 layers: the whole model's, and what follows each removed layer."""
    (leg,) = legs(runs(12, 1), FULL, 12)
    assert sum(len(leg.through(layer)) for layer in range(12)) == 12 + 12 * 11 // 2


class Killed(Exception):
    """Stands for a kill right after a save."""


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", [{}, {"depth": "greedy", "remove": 2}])
def test_a_killed_run_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, options: dict[str, Any]
) -> None:
    """Killed after every save in turn, and continued with another budget."""
    whole = scored(llama, tmp_path / "whole", streamed=streamed, **options)
    saves = 0
    save = measure.save_state

    def saved_once(*arguments: Any) -> None:
        nonlocal saves
        save(*arguments)
        saves += 1
        raise Killed

    monkeypatch.setattr(measure, "save_state", saved_once)
    unit = (len(ROWS) if streamed else SIZE) * 12 * 48 * 4
    while True:
        try:
            found = scored(llama, tmp_path / "a", streamed=streamed, carry_bytes=(3 + saves % 3) * unit, **options)
        except Killed:
            assert saves < 50
            continue
        break
    assert saves >= 3
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_small_chunks_give_the_same_sums(llama: Path) -> None:
    model = ResidentModel(Checkpoint(llama), device=CPU, dtype=torch.float32)
    split = make_split()
    ids, chosen = torch.from_numpy(split.rows(ROWS)), torch.from_numpy(split.targets(ROWS)[:, 1:])
    with torch.inference_mode():
        full = model.enter(ids)
        other = model.layer(0, full)
        whole = compare(model, full, [other], ids, chosen)
        parts = compare(model, full, [other], ids, chosen, chunk_elements=67 * 5)
        same = compare(model, full, [full], ids, chosen)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert whole[0, 1] == int(chosen.sum())
    assert same[1, 0] == same[0, 0] and same[1, 1:].tolist() == [0.0, 0.0]


@dataclass(frozen=True)
class Thread(Group):
    """A process that is a thread."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    shared: dict[int, torch.Tensor] = field(default_factory=dict)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shared[self.rank] = tensor.clone()
        self.barrier.wait(30)
        found = sum(self.shared[rank] for rank in range(self.size))
        self.barrier.wait(30)
        return found


@pytest.mark.parametrize("options", [{}, {"depth": "greedy", "remove": 2}])
def test_two_processes_find_what_one_finds(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Uneven shares of the sequences; every process ends with all scores."""
    whole = scored(llama, tmp_path / "whole", **options)
    barrier, shared = threading.Barrier(2), {}

    def work(rank: int) -> dict[str, np.ndarray]:
        group = Thread(rank, 2, barrier, shared)
        return scored(llama, tmp_path / "both", rows=group.share(ROWS), group=group, **options)

    (tmp_path / "both").mkdir()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, (0, 1)):
            assert found.keys() == whole.keys()
            for name, values in whole.items():
                np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9)
    assert len(list((tmp_path / "both").glob("state.depth-*"))) == 2


def test_what_cannot_be_scored(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="of 4 layers at most 3"):
        scored(llama, tmp_path / "a", depth="block", remove=4)
    with pytest.raises(ConfigError, match="whole model in memory"):
        scored(llama, tmp_path / "b", streamed=True, depth_task="mmlu")
    with pytest.raises(InputError, match="No token"):
        scored(llama, tmp_path / "c", rows=[])
    assert scored(llama, tmp_path / "d", loss_samples=0) == {}
    broken = make_model(tmp_path / "nan", "llama")
    with pytest.raises(RunError, match="--dtype float32"):
        model = ResidentModel(Checkpoint(broken), device=CPU, dtype=torch.float32)
        model.model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
        score_removals(model, make_split(), ROWS, config_for(broken), tmp_path)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"remove": 2}, "need --remove"),
    ({"depth": "greedy"}, "need --remove"),
    ({"depth_metric": "task"}, "needs --depth-task"),
    ({"depth_task_limit": 4}, "--depth-task-limit needs --depth-task"),
    ({"depth": "block", "remove": 2, "loss_samples": 0}, "needs --loss-samples"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(Path("model"), **options)
