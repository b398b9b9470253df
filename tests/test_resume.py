"""kill -9 at some instant, the same command again: the same bytes as an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_chain import make_checkpoint, make_data

TIMEOUT = 120.0


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("chain")
    checkpoint = make_checkpoint(root / "model")
    return checkpoint, make_data(root / "data", checkpoint, train=256)


def command(stage: str, chain: tuple[Path, Path], out: Path) -> list[str]:
    checkpoint, data = map(str, chain)
    start = [sys.executable, "-m", "minitron_cli"]
    if stage == "distill":
        options = ["--teacher", checkpoint, "--steps", "60", "--batch-size", "8", "--save-every", "10"]
        options += ["--init", "random", "--eval-every", "25"]
    else:
        options = ["--samples", "240", "--batch-size", "2", "--save-every", "10", "--loss-samples", "24"]
        options += ["--carry-bytes", "1"]  # one path at a time, so that the state is saved after each
    return [*start, *stage.split(), checkpoint, "--data", data, "--out", str(out), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def killed_when(arguments: list[str], ready: object) -> None:
    """Start, wait until `ready()`, kill -9."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    until = time.monotonic() + TIMEOUT
    while not ready():  # type: ignore[operator]
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stderr


RESULT = {
    "distill": "model.safetensors",
    "importance": "scores.safetensors",
    "importance --stream": "scores.safetensors",
}
STATES = {
    "distill": ["state.safetensors"],
    "importance": ["state.sweep-0-of-1.safetensors", "state.depth-0-of-1.safetensors"],
    "importance --stream": ["state.streamed-0-of-1.safetensors", "state.depth-0-of-1.safetensors"],
}


@pytest.mark.parametrize("stage", RESULT)
def test_kill_and_resume_is_bit_identical(stage: str, chain: tuple[Path, Path], tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    finish(command(stage, chain, undisturbed))
    arguments = command(stage, chain, out)
    partial = tmp_path / "killed.partial"
    # Before the first checkpoint, then in every phase right after one, then once more after another.
    killed_when(arguments, (partial / "minitron.partial.json").exists)
    assert not out.exists()
    for name in STATES[stage]:
        state = partial / name
        killed_when(arguments, state.exists)
        first = state.stat().st_mtime_ns
        killed_when(arguments, lambda: state.exists() and state.stat().st_mtime_ns != first)  # noqa: B023
    said = finish(arguments)
    assert stage != "distill" or "Resuming at step" in said
    assert (out / RESULT[stage]).read_bytes() == (undisturbed / RESULT[stage]).read_bytes()
    assert not partial.exists()
    assert "up to date" in finish(arguments)


def test_ctrl_c_and_sigterm_leave_a_resumable_state(chain: tuple[Path, Path], tmp_path: Path) -> None:
    """Exit codes 130 and 143, one sentence, and the next run goes on."""
    arguments = command("distill", chain, tmp_path / "out")
    state = tmp_path / "out.partial" / "state.safetensors"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
        before = state.stat().st_mtime_ns if state.exists() else 0
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code
        assert b"continues from the last checkpoint" in said
        assert b"Traceback" not in said
    assert "Resuming at step" in finish(arguments)
