"""Weight-norm scores: blocks of rows equal the whole, and units are summed as their definition says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from safetensors.torch import load_file, save_file

from minitron_cli.checkpoint.reader import Checkpoint, read_header
from minitron_cli.importance import weights
from minitron_cli.importance.weights import squared_sums, weight_norm_scores


@pytest.mark.parametrize("shape", [(13,), (13, 7), (5, 4, 3)])
def test_blocks_equal_the_whole(shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(shape)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "BLOCK_BYTES", 60)
    squares = tensor.double().square().numpy()
    [entry] = read_header(tmp_path / "x.safetensors")
    for dim, found in enumerate(squared_sums(entry)):
        expected = squares.sum(axis=tuple(other for other in range(squares.ndim) if other != dim))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_units_sum_their_own_weights(tmp_path: Path) -> None:
    """FFN neurons: rows of gate and up, columns of down, and their biases; heads: rows of q and columns of o."""
    path = make_model(tmp_path / "model")
    tensors = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}
    scores = weight_norm_scores(Checkpoint(path))
    layer = "model.layers.2."
    mlp = {name: tensors[f"{layer}mlp.{name}_proj.weight"].square() for name in ("gate", "up", "down")}
    bias = sum(tensors[f"{layer}mlp.{name}_proj.bias"].square() for name in ("gate", "up"))
    expected = (mlp["gate"].sum(1) + mlp["up"].sum(1) + mlp["down"].sum(0) + bias).sqrt()
    np.testing.assert_allclose(scores["ffn"][2], expected, rtol=1e-6)
    query = tensors[f"{layer}self_attn.q_proj.weight"].square().sum(1)
    query += tensors[f"{layer}self_attn.q_proj.bias"].square()
    out = tensors[f"{layer}self_attn.o_proj.weight"].square().sum(0)
    heads = (query + out).unflatten(0, (3, 2, 16)).sum(-1).sqrt()
    np.testing.assert_allclose(scores["group"][2], heads, rtol=1e-6)


def test_only_the_axes_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    everything, some = weight_norm_scores(checkpoint), weight_norm_scores(checkpoint, only=["head_dim"])
    assert some.keys() == {"head_dim"}
    np.testing.assert_array_equal(some["head_dim"], everything["head_dim"])
