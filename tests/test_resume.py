"""kill -9 at some instant, the same command again: the same bytes as an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    "distill": ["state.step-*.safetensors"],
    "importance": ["state.sweep-0-of-1.safetensors", "state.depth-0-of-1.safetensors"],
    "importance --stream": ["state.streamed-0-of-1.safetensors", "state.depth-0-of-1.safetensors"],
}


def written(partial: Path, pattern: str) -> int:
    """When the newest file of that name was written, in nanoseconds; 0 without one."""
    times = []
    for file in partial.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            times.append(file.stat().st_mtime_ns)
    return max(times, default=0)


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
        killed_when(arguments, lambda: written(partial, name))  # noqa: B023
        first = written(partial, name)
        killed_when(arguments, lambda: written(partial, name) not in (0, first))  # noqa: B023
    said = finish(arguments)
    assert stage != "distill" or "Resuming at step" in said
    assert (out / RESULT[stage]).read_bytes() == (undisturbed / RESULT[stage]).read_bytes()
    assert not partial.exists()
    assert "up to date" in finish(arguments)


def test_ctrl_c_and_sigterm_save_the_step_they_meet(chain: tuple[Path, Path], tmp_path: Path) -> None:
    """Exit codes 130 and 143, a checkpoint of the running step, and the next run goes on to the same bytes."""
    arguments = [*command("distill", chain, tmp_path / "out"), "--keep", "2"]
    partial = tmp_path / "out.partial"
    steps = [0]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
        before = last_step(partial)
        while last_step(partial) < before + 4:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code
        assert b"continues from the last checkpoint" in said
        assert b"Traceback" not in said
        saved = int(said.decode().split("Saved at step ")[1].split()[0])
        assert saved > steps[-1] + 3 and (partial / f"state.step-{saved:09d}.safetensors").exists()
        assert len(list(partial.glob("state.step-*"))) <= 2
        steps.append(saved)
    assert f"Resuming at step {steps[-1]} " in finish(arguments)
    finish(command("distill", chain, tmp_path / "undisturbed"))
    ended, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for name in ("model.safetensors", "curve.json"):
        assert (ended / name).read_bytes() == (undisturbed / name).read_bytes()
    assert [without_time(line) for line in lines(ended)] == [without_time(line) for line in lines(undisturbed)]
    assert not list(ended.glob("state.*"))


def last_step(partial: Path) -> int:
    return max((line["step"] for line in lines(partial)), default=0)


def lines(directory: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines(True) if line[-1] == "\n"]
    except FileNotFoundError:
        return []


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "tokens_per_second"}
