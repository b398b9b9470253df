"""Pruned == the original with the removed structure masked on disk, both run by the stock class.

Generated from the family list: every proven family, every axis it can cut. Each case has a control that must fail: the
mask of other units, or the compensation left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, make_model
from oracle import AXES, cases, masked_original
from safetensors.torch import load_file
from tiny import TINY
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.prune import PruneConfig
from minitron_cli.families import FAMILIES, family_for
from minitron_cli.families.schema import Family
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.shape import Shape

IDS = torch.randint(3, 67, (2, 24), generator=torch.Generator().manual_seed(0))
MATRIX = [(name, case) for name, config in TINY.items() for case in cases(Shape.of(config))]
_SOURCES: dict[str, Path] = {}


@pytest.fixture
def source(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of a family, saved once."""
    if family not in _SOURCES:
        _SOURCES[family] = make_model(tmp_path_factory.mktemp(family), family)
    return _SOURCES[family]


def prune(source: Path, out: Path, target: dict[str, int]) -> Path:
    run_prune(PruneConfig(checkpoint=str(source), out=out, **target))
    return out


@pytest.mark.parametrize(("family", "case"), MATRIX)
def test_pruned_equals_masked_original(family: str, case: str, source: Path, tmp_path: Path) -> None:
    target = cases(Checkpoint(source).shape)[case]
    config = PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", **target)
    plan = plan_prune(config)
    result = run_prune(config)
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    declared = Checkpoint(tmp_path / "pruned").declared
    numbers = sum(value.numel() for name, value in written.items() if declared[name][0].role != "buffer")
    assert result.params_after == numbers < result.params_before, "real counts: a slice that did nothing shows"
    pruned = logits(tmp_path / "pruned", IDS)
    masked = masked_original(source, plan, tmp_path / "masked").logits(IDS)
    control = masked_original(source, plan, tmp_path / "control", rotate=1).logits(IDS)
    # Some stock norms compute in fp32, whatever the model's dtype.
    assert (pruned - masked).abs().max() < 2e-4 * masked.abs().max()
    if case != "layers":
        assert (pruned - control).abs().max() > 1e-2 * masked.abs().max()
    if case == "hidden":
        bare = masked_original(source, plan, tmp_path / "bare", compensate=False).logits(IDS)
        assert (pruned - bare).abs().max() > 1e-2 * masked.abs().max(), "the mask alone is another function"


@pytest.mark.parametrize("family", [name for name, case in MATRIX if case == "layers"])
def test_layers_control_other_layer(family: str, source: Path, tmp_path: Path) -> None:
    """Dropping a layer equals zeroing that layer, and no other; per-layer lists follow."""
    config = PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", drop_layers=(1,))
    run_prune(config)
    wrong = plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "x", drop_layers=(3,)))
    pruned = logits(tmp_path / "pruned", IDS)
    right = masked_original(source, plan_prune(config), tmp_path / "right").logits(IDS)
    assert (pruned - right).abs().max() < 2e-4 * right.abs().max()
    other = masked_original(source, wrong, tmp_path / "wrong").logits(IDS)
    assert (pruned - other).abs().max() > 1e-2 * right.abs().max()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "pruned" / "config.json").read_text())
    for key, value in before.items():
        if isinstance(value, list) and len(value) == 4:
            assert after[key] == [value[0], value[2], value[3]], key


@pytest.mark.parametrize("family", TINY)
def test_identity_prune_is_bytewise(family: str, tmp_path: Path) -> None:
    """Cutting nothing copies every byte of every tensor."""
    source = make_model(tmp_path / "source", family, dtype=torch.bfloat16)
    prune(source, tmp_path / "same", {"layers": Checkpoint(source).shape["layers"]})
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", TINY)
def test_generation_with_cache_is_generation_without(family: str, source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "pruned", cases(Checkpoint(source).shape)["everything"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    with_cache = model.generate(IDS[:, :9], use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS[:, :9], use_cache=False, **options))


def test_every_proven_family_is_in_the_matrix() -> None:
    covered = {family_for(config).name for config in TINY.values()}
    assert covered == {family.name for family in FAMILIES if not family.draft}


UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("kv_heads", "qk_nope", "qk_rope"),
    "falcon_alibi": ("hidden", "heads", "kv_heads", "head_dim"),
    "falcon_multi_query": ("kv_heads",),
    "gpt2_by_layer": ("layers",),
    "olmo_clipped": ("head_dim",),
    "olmoe_clipped": ("head_dim",),
}
"""Cells that the stock class forbids; each family file quotes the line."""


def forbidden(family: Family, name: str) -> bool:
    """Whether a family has an axis that cannot be cut; one that only follows another is not a cell."""
    axis = next((axis for axis in family.axes if axis.name == name), None)
    return axis is not None and not axis.prunable and bool(axis.key or axis.why_not)


def test_unsupported_cells_are_frozen() -> None:
    found = {
        family.name: tuple(axis for axis in AXES if forbidden(family, axis)) for family in FAMILIES if not family.draft
    }
    assert {name: missing for name, missing in found.items() if missing} == UNSUPPORTED
    assert sum(map(len, UNSUPPORTED.values())) == 11
    for name, missing in UNSUPPORTED.items():
        family = next(each for each in FAMILIES if each.name == name)
        assert all(family.axis(axis).why_not for axis in missing), name


@pytest.mark.parametrize("family", ["llama"])
def test_sharded_output_loads(family: str, source: Path, tmp_path: Path) -> None:
    """Shards and their index hold the same tensors as one file; several files are read as one."""
    prune(source, tmp_path / "one", {"ffn": 40})
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "many", ffn=40, shard_bytes=20_000))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path / "one", IDS), logits(tmp_path / "many", IDS))
    again = run_prune(PruneConfig(checkpoint=str(tmp_path / "many"), out=tmp_path / "again", layers=3))
    assert again.shape["layers"] == 3
