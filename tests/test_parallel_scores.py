"""Scores gathered by several processes: the same as one process finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_chain import make_checkpoint, make_data
from helpers_torchrun import launch
from safetensors.numpy import load_file

OPTIONS = ["--samples", "13", "--batch-size", "2", "--loss-samples", "5", "--batch-agg", "var"]


@pytest.mark.parametrize("extra", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_two_processes_find_what_one_finds(extra: list[str], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    command = ["importance", str(checkpoint), "--data", str(data), "--json", *OPTIONS, *extra]
    alone, together = tmp_path / "alone", tmp_path / "together"
    one = subprocess.run(
        [sys.executable, "-m", "minitron_cli", *command, "--out", str(alone)], capture_output=True, text=True
    )
    assert one.returncode == 0, one.stderr[-3000:]
    two = launch(2, [*command, "--out", str(together)])
    assert two.returncode == 0, two.stderr[-3000:]
    assert json.loads(two.stdout)["samples"] == 13  # one JSON object, though two ran
    assert not list(tmp_path.glob("*.partial"))
    expected, found = (load_file(out / "scores.safetensors") for out in (alone, together))
    assert expected.keys() == found.keys() >= {"ffn", "hidden", "layers.bi", "layers.loss"}
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-6, atol=1e-9, err_msg=name)


def test_bad_input_is_told_once(tmp_path: Path) -> None:
    done = launch(2, ["importance", str(tmp_path / "nothing"), "--data", str(tmp_path), "--out", str(tmp_path / "o")])
    assert done.returncode != 0
    assert done.stderr.count("minitron: ") == 1, done.stderr
