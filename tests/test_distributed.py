"""Several processes do what one does: the same losses, resumes from each other's checkpoints, and a common end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed_checks import ALIGNED, CACHED, CASES, STEPS_OF_RUN, align_options, run_options, search_options
from helpers import make_model
from helpers_align import make_place
from helpers_chain import make_checkpoint, make_data
from helpers_torchrun import ROOT, launch, torchrun

from minitron_cli.align.stage import run_align
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.stage import run_distill
from minitron_cli.importance.stage import run_importance
from minitron_cli.manifest import read_manifest
from minitron_cli.search.stage import run_search

CHECKS = [
    *(f"training:{name}" for name in CASES),
    "saving",
    "damage",
    "evaluation",
    "nan",
    "cached",
    "runs",
    "search",
    "align",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    make_checkpoint(root / "teacher", num_hidden_layers=3, hidden_size=36)
    make_checkpoint(root / "tied", num_hidden_layers=2, seed=1)
    make_checkpoint(root / "untied", num_hidden_layers=2, seed=2, tie_word_embeddings=False)
    for family in ("gemma2", "gpt2", "opt-post_norm", "phi", "mixtral"):
        make_model(root / family, family, seed=3)
    make_data(root / "data", root / "teacher", train=48)
    scores = {"checkpoint": str(root / "tied"), "data": root / "data", "samples": 8, "loss_samples": 0}
    run_importance(ImportanceConfig(**scores, out=root / "scores"))
    make_place(root / "align")
    return root


@pytest.fixture(scope="module")
def killed(root: Path) -> dict[str, Any]:
    """A run of two processes, one of which was killed after the first checkpoint: what it left, and how it ended."""
    out, partial = root / "killed", root / "killed.partial"
    process = subprocess.Popen(
        **torchrun(2, "-m", "minitron_cli", *command(root, out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not list(partial.glob("state.step-*[0-9]")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    workers = [each for each in psutil.Process(process.pid).children() if "minitron_cli" in each.cmdline()]
    workers[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    for processes in (1, 2, 3):
        shutil.copytree(partial, root / f"on-{processes}.partial")
    gone = [not psutil.pid_exists(each.pid) for each in workers]
    return {"seconds": time.monotonic() - began, "said": said, "gone": gone, "code": process.returncode, "out": out}


@pytest.fixture(scope="module")
def passed(root: Path, killed: dict[str, Any]) -> list[str]:
    """The checks of distributed_checks.py, in one start of two processes."""
    script = str(ROOT / "tests" / "distributed_checks.py")
    done = subprocess.run(**torchrun(2, script, str(root), *CHECKS), capture_output=True, timeout=300)
    print(done.stderr[-6000:])
    return [line.removeprefix("passed ") for line in done.stdout.splitlines() if line.startswith("passed ")]


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """What one process makes of the same."""
    run_distill(DistillConfig(**run_options(root, root / "one")))
    return root / "one"


def command(root: Path, out: Path) -> list[str]:
    """`distill` of `run_options`."""
    given = run_options(root, out)
    student = str(given.pop("student"))
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in given.items())
    return ["distill", student, *(part for pair in pairs for part in pair)]


def curve(out: Path) -> list[float]:
    """Training losses, then validation losses."""
    found = json.loads((out / "curve.json").read_text())
    return found["loss"] + [loss for _, loss in found["validation"]]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_do_what_one_does(check: str, passed: list[str]) -> None:
    """After one that fails, the later ones did not run."""
    assert check in passed


def test_a_cache_serves_any_number_of_processes(root: Path, passed: list[str]) -> None:
    alone = {**CACHED, "student": str(root / "untied"), "teacher": str(root / "cache"), "data": root / "data"}
    run_distill(DistillConfig(**alone, lr=1e-3, out=root / "alone"))
    assert curve(root / "cached") == pytest.approx(curve(root / "alone"), rel=1e-5)


def test_a_search_finds_the_same(root: Path, passed: list[str]) -> None:
    alone = run_search(SearchConfig(**search_options(root, root / "searched-alone")))
    together = read_manifest(root / "searched")["result"]
    assert [each["name"] for each in together["candidates"]] == [each["name"] for each in alone.candidates]
    for name in ("loss_zero_shot", "loss_retrained"):
        values = [[each[name] for each in found] for found in (together["candidates"], alone.candidates)]
        assert values[0] == pytest.approx(values[1], rel=1e-5) and None not in values[0]


@pytest.mark.parametrize("name", ALIGNED)
def test_alignment_learns_the_same(name: str, root: Path, passed: list[str]) -> None:
    run_align(align_options({**make_place(root / "align", make=False), **ALIGNED[name]}, root / f"{name}-one"))
    one, two = (
        [json.loads(line) for line in (root / f"{name}-{count}" / "log.jsonl").read_text().splitlines()]
        for count in ("one", "two")
    )
    assert len(one) == len(two) >= 6
    for mine, theirs in zip(two, one, strict=True):
        mine.pop("responses_per_second", None), theirs.pop("responses_per_second", None)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_killed_process_ends_all(killed: dict[str, Any]) -> None:
    assert killed["code"] and killed["seconds"] < 60 and killed["gone"] == [True, True]
    assert killed["said"].count("minitron: ") == 1, killed["said"]
    assert "Another process of this run was lost" in killed["said"]
    assert not killed["out"].exists()


def test_one_process_goes_on(root: Path, killed: dict[str, Any], one: Path) -> None:
    run_distill(DistillConfig(**run_options(root, root / "on-1")))
    assert curve(root / "on-1") == pytest.approx(curve(one), rel=1e-5)
    assert not list((root / "on-1").glob("state.*"))


def test_two_processes_go_on_to_the_same_bytes(root: Path, passed: list[str], one: Path) -> None:
    """As two that nobody disturbed."""
    for name in ("model.safetensors", "curve.json"):
        assert (root / "on-2" / name).read_bytes() == (root / "two" / name).read_bytes()
    assert curve(root / "two") == pytest.approx(curve(one), rel=1e-5)


def test_three_processes_go_on(root: Path, killed: dict[str, Any], one: Path) -> None:
    done = launch(3, [*command(root, root / "on-3"), "--json"])
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == STEPS_OF_RUN, done.stderr
    assert "Resuming at step 4 of" in done.stderr
    assert curve(root / "on-3") == pytest.approx(curve(one), rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused_once(root: Path, tmp_path: Path) -> None:
    done = launch(2, [*command(root, tmp_path / "out"), "--batch-size", "7"])
    assert done.returncode
    assert done.stderr.count("minitron: ") == 1, done.stderr
    assert "use 6 or 8" in done.stderr
    assert not (tmp_path / "out.partial").exists()
