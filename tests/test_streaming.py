"""One layer in memory at a time: the same hidden states to the bit, the same scores, less memory than the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from tiny import TINY

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import CheckpointError
from minitron_cli.importance import stream
from minitron_cli.importance.activations import Activations
from minitron_cli.importance.collect import ResidentSweep
from minitron_cli.importance.gather import Gathered
from minitron_cli.importance.stream import StreamedSweep
from minitron_cli.models.head import backbone_output
from minitron_cli.models.streaming import ResidentModel, StreamedModel, open_model, weight_bytes
from minitron_cli.tokens import Split

CPU = torch.device("cpu")
ROWS, LENGTH, BATCH = 11, 20, 3
LAYER_COUNT = 4


@pytest.fixture(scope="module")
def split() -> Split:
    tokens = np.random.default_rng(0).integers(3, 60, (40, LENGTH)).astype(np.uint16)
    return Split("train", tokens, None, 1.0)


def configuration(directory: Path, **changes: object) -> ImportanceConfig:
    values = {"checkpoint": "c", "data": directory, "out": directory / "out", "batch_size": BATCH, **changes}
    return ImportanceConfig(**values)


def streamed_sweep(
    model: StreamedModel, config: ImportanceConfig, split: Split, state: Path, place: torch.device | None
) -> StreamedSweep:
    size = (ROWS, LENGTH, model.shape["hidden"])
    activations = Activations(size, torch.float32, state.with_name(f"{state.name}.activations"), place=place)
    return StreamedSweep(model, Gathered(model, config), activations, config, split, list(range(ROWS)), state)


def resident_scores(path: Path, split: Split) -> dict[str, np.ndarray]:
    model = open_model(Checkpoint(path), CPU, torch.float32, streamed=False)
    assert isinstance(model, ResidentModel)
    config = configuration(path)
    gathered = Gathered(model, config)
    ResidentSweep(model, gathered, config, split, list(range(ROWS)), path / "state.resident").run()
    return gathered.scores()


@pytest.mark.parametrize("family", TINY)
def test_layer_by_layer_is_the_stock_forward_and_gives_the_same_scores(
    family: str, split: Split, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, family))
    resident = open_model(checkpoint, CPU, torch.float32, streamed=False)
    streamed = open_model(checkpoint, CPU, torch.float32, streamed=True)
    ids = torch.from_numpy(split.rows(range(2)))
    with torch.inference_mode():
        stock = backbone_output(resident.model, ids).last_hidden_state
        for model in (resident, streamed):
            states = model.enter(ids)
            for number in range(len(model.layers)):
                with model.loaded(number):
                    states = model.layer(number, states)
            assert torch.equal(model.leave(states).last_hidden_state, stock)
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())

    assert isinstance(streamed, StreamedModel)
    expected = resident_scores(tmp_path, split)
    for place in (CPU, None):
        sweep = streamed_sweep(streamed, configuration(tmp_path), split, tmp_path / f"state.{place}", place)
        sweep.run()
        found = sweep.gathered.scores()
        assert found.keys() == expected.keys()
        for name, scores in expected.items():
            np.testing.assert_allclose(found[name], scores, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("place", [CPU, None], ids=["in memory", "on disk"])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 11])
def test_a_stopped_sweep_goes_on_at_its_layer_and_ends_in_the_same_bytes(
    stop: int, place: torch.device | None, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SAVE_SHARE", 1e9)  # save after every layer in memory too
    checkpoint = Checkpoint(make_model(tmp_path, "gemma3_text"))
    config = configuration(tmp_path)

    def sweep(name: str) -> StreamedSweep:
        model = open_model(checkpoint, CPU, torch.float32, streamed=True)
        assert isinstance(model, StreamedModel)
        return streamed_sweep(model, config, split, tmp_path / name, place)

    undisturbed = sweep("state.whole")
    undisturbed.run()
    disturbed, written = sweep("state.part"), 0
    write = disturbed.activations.write

    def failing(rows: slice, states: torch.Tensor) -> None:
        nonlocal written
        written += 1
        # The embeddings are the first four writes; every layer makes four more.
        if written > 4 + stop:
            raise KeyboardInterrupt
        write(rows, states)

    monkeypatch.setattr(disturbed.activations, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        disturbed.run()
    resumed = sweep("state.part")
    resumed.run()
    assert (stop >= 4) == (len(resumed.batches) * (LAYER_COUNT - stop // 4) < 16)
    for name, scores in undisturbed.gathered.scores().items():
        assert np.array_equal(resumed.gathered.scores()[name], scores), name


def test_statistics_of_two_halves_join_to_those_of_the_whole(split: Split, tmp_path: Path) -> None:
    from minitron_cli.importance.statistics import SampleStatistic

    samples = torch.from_numpy(np.random.default_rng(1).normal(3.0, 2.0, (9, 5)))
    for kind in ("mean", "l2", "var"):
        whole, first, second = (SampleStatistic(5, kind) for _ in range(3))
        whole.add(samples)
        first.add(samples[:2])
        second.add(samples[2:])
        first.merge(second)
        torch.testing.assert_close(first.value(), whole.value(), rtol=1e-12, atol=0)
        empty = SampleStatistic(5, kind)
        empty.merge(whole)
        torch.testing.assert_close(empty.value(), whole.value(), rtol=1e-12, atol=0)


def test_a_file_cut_short_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, "llama"))
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        for number in range(len(model.layers)):
            with model.loaded(number):
                pass


MEMORY = Path(__file__).with_name("streaming_memory.py")


def test_every_family_is_scored_in_an_address_space_smaller_than_the_model(tmp_path: Path) -> None:
    """One process for all of them; the script asserts and says what it found. Variants of a type load as it does."""
    families = [name for name in TINY if "-" not in name]
    arguments = [sys.executable, str(MEMORY), str(tmp_path), *families]
    # A fixed threshold keeps tensors out of the C library's heap, whose holes would count as address space in use.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **allocator}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["control", *families]


def test_weight_bytes_add_up(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, "llama"))
    assert sum(weight_bytes(checkpoint, 4).values()) == checkpoint.nbytes
