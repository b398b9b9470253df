"""Pickled checkpoints: refused by every stage, converted on request, and never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers import logits, make_model
from safetensors.torch import load_file

from minitron_cli.checkpoint.convert import run_convert
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.convert import ConvertConfig
from minitron_cli.errors import CheckpointError

IDS = torch.arange(3, 27)[None]


def pickled(path: Path, parts: int = 1) -> dict[str, torch.Tensor]:
    """Turn a safetensors checkpoint into a pickled one; returns its tensors."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    for part in range(parts):
        suffix = "" if parts == 1 else f"-{part + 1:05d}-of-{parts:05d}"
        torch.save({name: tensors[name] for name in names[part::parts]}, path / f"pytorch_model{suffix}.bin")
    (path / "model.safetensors").unlink()
    return tensors


@pytest.mark.parametrize("parts", [1, 3])
def test_conversion_keeps_every_byte(parts: int, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    expected = logits(source, IDS)
    tensors = pickled(source, parts)
    with pytest.raises(CheckpointError, match="minitron convert"):
        Checkpoint(source)
    result = run_convert(ConvertConfig(checkpoint=str(source), out=tmp_path / "out"))
    assert result.tensors == len(tensors)
    checkpoint = Checkpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(logits(tmp_path / "out", IDS), expected)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_model(tmp_path / "model")
    pickled(source)
    torch.save({"x": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        run_convert(ConvertConfig(checkpoint=str(source), out=tmp_path / "out"))
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to convert"):
        run_convert(ConvertConfig(checkpoint=str(make_model(tmp_path / "model")), out=tmp_path / "out"))
