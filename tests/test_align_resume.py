"""kill -9 while aligning, the same command again: the same bytes as an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_align import make_place
from test_resume import TIMEOUT, environment, finish, killed_when, last_step, lines

METHODS: dict[str, list[str]] = {
    "bond": ["--n", "2", "--anchor-every", "3"],
    "jbond": ["--method", "jbond", "--gamma", "0.2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_place(tmp_path_factory.mktemp("align"))


def command(place: dict[str, Any], method: str, out: Path) -> list[str]:
    start = [sys.executable, "-m", "minitron_cli", "align", place["policy"], "--prompts", str(place["prompts"])]
    options = ["--reward", "length:40", "--steps", "30", "--batch-size", "4", "--k", "4", "--max-new-tokens", "6"]
    options += ["--eval-samples", "16", "--eval-every", "8", "--save-every", "5", "--lr", "1e-3", "--device", "cpu"]
    return [*start, "--out", str(out), *options, *METHODS[method]]


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "responses_per_second"}


@pytest.mark.parametrize("method", METHODS)
def test_kill_and_resume_is_bit_identical(method: str, place: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 right after the second checkpoint, or between two; then Ctrl-C."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    finish(command(place, method, undisturbed))
    arguments, partial = command(place, method, out), tmp_path / "killed.partial"
    if method == "bond":
        killed_when(arguments, lambda: (partial / "state.step-000000010.safetensors").exists())
    else:
        killed_when(arguments, lambda: last_step(partial) >= 13)
        interrupted(arguments, partial)
    assert "Resuming at step" in finish(arguments)
    for name in ("model.safetensors", "curve.json", "samples.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert [without_time(line) for line in lines(out)] == [without_time(line) for line in lines(undisturbed)]
    assert not partial.exists()


def interrupted(arguments: list[str], partial: Path) -> None:
    """Ctrl-C while a step runs: it ends, is saved, and the exit code is 130."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    before, until = last_step(partial), time.monotonic() + TIMEOUT
    while last_step(partial) < before + 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and b"Saved at step " in said and b"Traceback" not in said
