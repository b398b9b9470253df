"""kill -9 and SIGTERM in every phase of a search, the same command again: the same bytes as an undisturbed one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_search import found, make_scored, search

from minitron_cli.config.search import SearchConfig
from minitron_cli.search.commands import search_command

TIMEOUT = 120.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {"rungs": 3, "steps": 40, "save_every": 2, "eval_every": 11}
    return {**make_scored(tmp_path_factory.mktemp("resume")), **changes}


def stopped_when(arguments: list[str], ready: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Start, wait until `ready()`, send the signal; exit code and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


def test_stopped_in_every_phase(settings: dict[str, Any], tmp_path: Path) -> None:
    search(settings, tmp_path / "whole")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    words = shlex.split(search_command(SearchConfig(**settings, out=out)))
    arguments = [sys.executable, "-m", "minitron_cli", *words[1:-1], str(out)]

    def saved(step: int) -> Callable[[], bool]:
        """Some candidate has a checkpoint of this step or a later one."""

        def ready() -> bool:
            steps = [int(path.name[:-12].rsplit("-", 1)[1]) for path in partial.glob("state.candidate-*.safetensors")]
            return max(steps, default=0) >= step

        return ready

    assert stopped_when(arguments, (partial / "state.search.json").exists, signal.SIGKILL)[0] == -signal.SIGKILL
    assert stopped_when(arguments, saved(4), signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = stopped_when(arguments, saved(12), signal.SIGTERM)
    assert code == 143 and "Saved the candidates in training at step" in said and "Traceback" not in said
    assert not out.exists()
    search(settings, out)
    assert found(out) == found(tmp_path / "whole")
