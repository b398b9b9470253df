"""`minitron bench`: what is timed, what the numbers mean, what is refused."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import make_model
from transformers import AutoModelForCausalLM

from minitron_cli.bench.stage import BenchResult, run_bench
from minitron_cli.bench.summary import compare, summarise
from minitron_cli.bench.table import format_bench
from minitron_cli.bench.worker import Case, Meter, Sample, generate, greedy
from minitron_cli.config.bench import BenchConfig
from minitron_cli.errors import CheckpointError, ConfigError, ResourceError, RunError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_tokens_are_those_of_the_stock_generation(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, family)).eval()
    ids = torch.arange(2 * 7).reshape(2, 7) + 3
    ours = torch.cat(list(greedy(model, ids, 6)), 1)
    model.generation_config.eos_token_id = None
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[:, 7:]
    assert ours.tolist() == theirs.tolist()


def test_a_sample_has_one_time_per_token(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path)).eval()
    began = time.perf_counter()
    sample = generate(model, Case(2, 5, 4), Meter(CPU))
    assert len(sample.tokens) == 3
    assert 0 < sample.first_token + sum(sample.tokens) < time.perf_counter() - began


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_peak_memory_forgets_what_was_before() -> None:
    meter = Meter(CPU)
    block = torch.ones(64 << 18)  # 64 MiB
    assert meter.peak() > 60 << 20
    del block
    meter.reset()
    assert meter.peak() < 32 << 20


def test_numbers_of_a_case() -> None:
    case = Case(batch_size=2, context=100, new_tokens=3)
    ours = summarise(case, [Sample(0.5, (0.1, 0.3), 50), Sample(1.0, (0.2, 0.2), 70), Sample(2.0, (0.4, 0.4), 60)], 40)
    assert ours.prefill_tokens_per_second == 200  # median of 400, 200, 100
    assert ours.decode_tokens_per_second == pytest.approx(10)  # median of 10, 10, 5
    assert ours.time_to_first_token == 1.0
    assert ours.token_p50 == pytest.approx(0.25)
    assert (ours.peak_bytes, ours.kv_bytes) == (70, 40)
    theirs = summarise(
        case, [Sample(1.0, (0.2, 0.2), 140), Sample(1.0, (0.2, 0.2), 140), Sample(2.0, (0.2, 0.2), 1)], 80
    )
    ratio = compare(ours, theirs)
    assert (ratio["prefill"], ratio["prefill_low"], ratio["prefill_high"]) == (
        1,
        1,
        2,
    )  # of each round, then the median
    assert (ratio["decode"], ratio["decode_low"]) == (pytest.approx(1), pytest.approx(0.5))
    assert (ratio["peak_bytes"], ratio["kv_bytes"]) == (0.5, 0.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchConfig, BenchResult]:
    """A model with 2 layers against one with 4."""
    root = tmp_path_factory.mktemp("bench")
    small, large = (make_model(root / name, num_hidden_layers=layers) for name, layers in (("small", 2), ("large", 4)))
    config = BenchConfig(
        checkpoint=str(small), against=str(large), batch_size=(1, 3), context=(8,), new_tokens=4, rounds=2,
        out=root / "out", device="cpu",
    )  # fmt: skip
    return config, run_bench(config)


def test_result(measured: tuple[BenchConfig, BenchResult]) -> None:
    config, result = measured
    assert [(case["batch_size"], case["context"]) for case in result.cases] == [(1, 8), (3, 8)]
    assert result.models[1]["kv_bytes_per_token"] == 2 * result.models[0]["kv_bytes_per_token"]
    for case in result.cases:
        assert case["ratio"]["kv_bytes"] == 0.5
        assert case["checkpoint"]["kv_bytes"] == case["batch_size"] * 12 * result.models[0]["kv_bytes_per_token"]
        assert all(value > 0 for value in case["ratio"].values())
        assert len(case["against"]["decode_rounds"]) == 2
    first = result.cases[0]["checkpoint"]
    assert result.prefill_tokens_per_second == first["prefill_tokens_per_second"]
    assert result.decode_tokens_per_second == first["decode_tokens_per_second"]
    assert result.ratio == result.cases[0]["ratio"]
    assert result.peak_bytes == max(case["checkpoint"]["peak_bytes"] for case in result.cases)
    assert config.out is not None
    assert json.loads((config.out / "bench.json").read_text()) == json.loads(json.dumps(result.to_json()))


def test_a_second_run_reads_the_first(measured: tuple[BenchConfig, BenchResult]) -> None:
    config, result = measured
    assert json.dumps(asdict(run_bench(config))) == json.dumps(asdict(result))


def test_plot_and_table(measured: tuple[BenchConfig, BenchResult]) -> None:
    config, result = measured
    assert config.out is not None
    drawing = ElementTree.fromstring((config.out / "bench.svg").read_text("utf-8"))
    bars = [item for item in drawing.iter("{http://www.w3.org/2000/svg}rect") if float(item.get("height", 0)) == 14]
    assert len(bars) == 2 * 2 * 2  # metrics, cases, checkpoints
    longest = max(float(bar.get("width", 0)) for bar in bars)
    assert 0 < min(float(bar.get("width", 0)) for bar in bars) <= longest < 600
    table = format_bench(json.loads(json.dumps(result.to_json())))
    assert table.count("ratio") == 2
    assert "small" in table and "large" in table


def test_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = BenchConfig(checkpoint=str(model), batch_size=(2,), context=(4,), new_tokens=2, rounds=1, device="cpu")
    result = run_bench(config)
    assert result.out is None and result.ratio is None
    assert "against" not in result.cases[0]
    assert "ratio" not in format_bench(json.loads(json.dumps(result.to_json())))
    assert not [item for item in tmp_path.iterdir() if item.name != "model"]


def test_a_context_beyond_the_model_is_one_sentence(tmp_path: Path) -> None:
    model = make_model(tmp_path, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="context of 64 tokens, and --context with --new-tokens needs 84"):
        run_bench(BenchConfig(checkpoint=str(model), context=(52,), new_tokens=32))


def test_too_little_memory_is_said_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    monkeypatch.setattr("minitron_cli.runtime.memory.available_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="--batch-size"):
        run_bench(BenchConfig(checkpoint=str(model), context=(8,), device="cpu"))


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size"):
        BenchConfig(checkpoint="c", batch_size=("0",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--context: give at least one"):
        BenchConfig(checkpoint="c", context="")  # type: ignore[arg-type]


def test_what_a_process_refuses_is_told_here(tmp_path: Path) -> None:
    good, bad = make_model(tmp_path / "good"), make_model(tmp_path / "bad")
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="bad"):
        run_bench(BenchConfig(checkpoint=str(good), against=str(bad), context=(8,), device="cpu"))


def test_a_killed_process_is_one_sentence(tmp_path: Path) -> None:
    config = BenchConfig(checkpoint=str(make_model(tmp_path)), context=(8,), rounds=10_000, device="cpu")

    def kill() -> None:
        while True:
            for child in psutil.Process().children(recursive=True):
                if any("spawn_main" in word for word in _words(child)) and child.cpu_times().user > 1.5:
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(RunError, match="ended by itself"):
        run_bench(config)
    thread.join()


def _words(process: psutil.Process) -> list[Any]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
