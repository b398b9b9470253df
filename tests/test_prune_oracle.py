"""Pruned == the original with the removed structure masked on disk, both run by the stock class.

For every proven family and axis. A mask alone is not the same function where a norm averages over the cut axis (its
weight and epsilon are compensated) and under rotary positions (only kept frequencies are compared). Each case has a
control that must fail: the mask of other units, or the compensation left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, logits, make_model
from safetensors.torch import load_file, save_file

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.surgery import positions
from minitron_cli.config.prune import PruneConfig
from minitron_cli.families.expression import axes, parse
from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.stage import plan_prune, run_prune

CASES: dict[str, dict[str, int]] = {
    "hidden": {"hidden": 36},
    "ffn": {"ffn": 40},
    "heads": {"heads": 3},
    "kv_heads": {"kv_heads": 2},
    "heads+kv_heads": {"kv_heads": 2, "heads": 2},
    "head_dim": {"head_dim": 8},
    "head_dim, odd progression": {"head_dim": 6},
    "layers": {"layers": 2},
    "everything": {"hidden": 24, "ffn": 16, "kv_heads": 2, "heads": 2, "head_dim": 8, "layers": 3},
}
IDS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(0))


def masked_original(source: Path, plan: PrunePlan, out: Path, *, compensate: bool = True, rotate: int = 0) -> Path:
    """The original with every removed unit's weights zeroed; `rotate` masks other units instead (a control)."""
    checkpoint = Checkpoint(source)
    shape, family = checkpoint.shape, checkpoint.shape.family
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    within = {axis.name: axis.within for axis in family.axes if axis.within}
    ratio = plan.sizes["hidden"] / plan.sizes_before["hidden"]
    for name, (tensor, layer) in checkpoint.declared.items():
        value = tensors[name].double()
        if layer is not None and layer not in plan.layers:
            # A removed layer adds nothing to the residual stream.
            tensors[name] = torch.zeros_like(value).float() if tensor.role != "norm" else tensors[name]
            continue
        kept = plan.kept(layer)
        for dim, text in enumerate(tensor.dims):
            mask = torch.zeros(value.shape[dim], dtype=torch.bool)
            chosen = (positions(parse(text), shape.sizes, kept, within) + rotate) % value.shape[dim]
            mask[torch.from_numpy(np.ascontiguousarray(chosen))] = True
            value = value * mask.view([-1 if d == dim else 1 for d in range(value.ndim)])
        if tensor.role == "norm" and "hidden" in axes(parse(tensor.dims[0])) and compensate:
            value = value * math.sqrt(ratio)
        tensors[name] = value.float()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    copy_companions(source, out)
    config = json.loads((source / "config.json").read_text())
    if compensate:
        config["rms_norm_eps"] *= ratio
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", TINY)
def test_pruned_equals_masked_original(family: str, case: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", family)
    target = dict(CASES[case])
    if family == "mistral" and "hidden" in target:
        target["hidden"] -= 1  # nothing in this family asks hidden to be a multiple of anything
    config = PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", **target)
    plan = plan_prune(config)
    result = run_prune(config)
    assert result.params_after == sum(v.numel() for v in load_file(tmp_path / "pruned" / "model.safetensors").values())
    pruned = logits(tmp_path / "pruned", IDS)
    masked = logits(masked_original(source, plan, tmp_path / "masked"), IDS)
    control = logits(masked_original(source, plan, tmp_path / "control", rotate=1), IDS)
    # The stock RMSNorm computes in fp32, whatever the model's dtype.
    assert (pruned - masked).abs().max() < 2e-4 * masked.abs().max()
    if case != "layers":
        assert (pruned - control).abs().max() > 1e-2 * masked.abs().max()


def test_hidden_needs_the_norm_factor(tmp_path: Path) -> None:
    """The control of the hidden axis: without the factor the masked original is another function."""
    source = make_model(tmp_path / "source")
    plan = plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "x", hidden=36))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", hidden=36))
    masked = logits(masked_original(source, plan, tmp_path / "masked", compensate=False), IDS)
    assert (logits(tmp_path / "pruned", IDS) - masked).abs().max() > 1e-2 * masked.abs().max()


def test_layers_control_other_layer(tmp_path: Path) -> None:
    """Dropping a layer equals zeroing that layer, and no other."""
    source = make_model(tmp_path / "source")
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", drop_layers=(1,)))
    right = plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "x", drop_layers=(1,)))
    wrong = plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "y", drop_layers=(2,)))
    pruned = logits(tmp_path / "pruned", IDS)
    assert torch.allclose(pruned, logits(masked_original(source, right, tmp_path / "right"), IDS), atol=1e-4)
    assert not torch.allclose(pruned, logits(masked_original(source, wrong, tmp_path / "wrong"), IDS), atol=1e-2)


@pytest.mark.parametrize("family", TINY)
def test_identity_prune_is_bytewise(family: str, tmp_path: Path) -> None:
    """Cutting nothing copies every byte of every tensor."""
    source = make_model(tmp_path / "source", family, dtype=torch.bfloat16)
    sizes = Checkpoint(source).shape.sizes
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "same", hidden=sizes["hidden"], ffn=sizes["ffn"]))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharded_output_loads(tmp_path: Path) -> None:
    """Shards and their index hold the same tensors as one file."""
    source = make_model(tmp_path / "source")
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "one", ffn=40))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "many", ffn=40, shard_bytes=20_000))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path / "one", IDS), logits(tmp_path / "many", IDS))
    again = run_prune(PruneConfig(checkpoint=str(tmp_path / "many"), out=tmp_path / "again", layers=3))
    assert again.shape["layers"] == 3
