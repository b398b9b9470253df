"""Cuts on tables and configs alone, and on checkpoints as they were published: prefixes, mask buffers, head copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import logits, make_model
from safetensors.torch import load_file, save_file
from tiny import TINY
from transformers import AutoConfig

from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.rotary import choose, per_unit, retuned, rope_types, turning, unit_count
from minitron_cli.checkpoint.surgery import new_config, of_term
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import FamilyError, ShapeError
from minitron_cli.families import family_for
from minitron_cli.families.expression import parse
from minitron_cli.families.schema import Rotary
from minitron_cli.prune.plan import size_plan
from minitron_cli.prune.sizes import complete_target
from minitron_cli.prune.stage import run_prune
from minitron_cli.shape import Shape

IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("kv*group*d + kv*d + kv*d", list(range(12))),
        ("kv*(group*d + d + d)", [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]),
        ("kv*group*d", list(range(12))),
        ("group*d + d + d", list(range(6))),
    ],
)
def test_queries_of_a_fused_projection(text: str, queries: list[int]) -> None:
    sizes = {"kv": 2, "group": 2, "d": 3}
    assert np.flatnonzero(of_term(parse(text), sizes)).tolist() == queries


def test_a_progression_of_pairs_and_the_best_of_the_rest() -> None:
    rotary, config = Rotary(fraction=0.5, fraction_key="partial_rotary_factor"), {}
    assert (turning(rotary, config, 16), unit_count(rotary, config, 16)) == (8, 4 + 8)
    assert per_unit(rotary, config, np.arange(16.0)).tolist() == [4, 6, 8, 10, *range(8, 16)]
    scores = np.array([5.0, 1, 9, 1, 1, 8, 7, 1, 6, 1, 1, 5])
    # Eight channels: two pairs (0 and 2, not 0 and 1) and the four best that do not turn.
    assert choose(rotary, config, scores, 16, 8) == (2, [0, 2, 4, 6, 9, 10, 12, 15])
    interleaved = Rotary(layout="interleaved", fraction=0.5, fraction_key="partial_rotary_factor")
    assert choose(interleaved, config, scores, 16, 8)[1] == [0, 1, 4, 5, 9, 10, 12, 15]
    assert turning(rotary, {"rope_parameters": {"partial_rotary_factor": 0.25}}, 16) == 4
    assert turning(Rotary(), {"partial_rotary_factor": 0.25}, 16) == 16  # a class that reads no fraction


SPARSE = [name for name in TINY if family_for(TINY[name]).layer_rules]


@pytest.mark.parametrize("name", SPARSE)
def test_layer_types_follow_where_the_config_leaves_them_out(name: str) -> None:
    """What the class computes from layer numbers is written out once layers are missing."""
    config = TINY[name]
    family, kept = family_for(config), [1, 3]
    sizes = {**family.sizes(config), "layers": 2}
    cut = new_config(config, family, sizes, kept)
    before, after = family.layer_tags(config, 4), family.layer_tags(cut, 2)
    assert after == [before[layer] for layer in kept]
    full = AutoConfig.for_model(**config)
    if hasattr(full, "layer_types"):
        assert AutoConfig.for_model(**cut).layer_types == [full.layer_types[layer] for layer in kept]
    if hasattr(full, "no_rope_layers"):
        assert cut["no_rope_layers"] == [full.no_rope_layers[layer] for layer in kept]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in TINY
        if (rotary := family_for(TINY[name]).rotary) and family_for(TINY[name]).axis(rotary.axis).prunable
    ],
)
def test_theta_follows_under_old_and_new_keys(name: str) -> None:
    """Sparse and written-out configs mean the same frequencies to the stock class after a cut."""
    family = family_for(TINY[name])
    rotary = family.rotary
    assert rotary is not None
    written = AutoConfig.for_model(**TINY[name]).to_dict()
    legacy = {**TINY[name], rotary.theta_key: 777.0}
    assert rope_types(rotary, written) == rope_types(rotary, legacy) == {"default"}
    for config in (written, TINY[name], legacy):
        step = 2
        exponent = step * turning(rotary, config, 16) / turning(rotary, config, 24)
        changes = retuned(config, rotary, 24, 16, step)
        before = AutoConfig.for_model(**config).rope_parameters
        gone = {key for key, value in changes.items() if value is None}
        changed = {key: value for key, value in {**config, **changes}.items() if key not in gone}
        after = AutoConfig.for_model(**changed).rope_parameters
        for section in rotary.sections or [None]:
            old, new = (params[section] if section else params for params in (before, after))
            assert new["rope_theta"] == pytest.approx(old["rope_theta"] ** exponent)
            assert {**new, "rope_theta": 0} == {**old, "rope_theta": 0}


def test_scaled_rope_is_refused_where_it_depends_on_the_size() -> None:
    shape = Shape.of({**TINY["llama"], "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ShapeError, match="yarn"):
        complete_target(shape, {"head_dim": 8})
    assert complete_target(shape, {"ffn": 8})["ffn"] == 8


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"hidden": 30}, {"hidden": 30, "heads": 5, "head_dim": 6}),
        ({"heads": 3}, {"hidden": 24, "heads": 3, "kv_heads": 3, "head_dim": 8}),
        ({"kv_heads": 3}, {"hidden": 24, "heads": 3, "kv_heads": 3, "head_dim": 8}),
        ({"head_dim": 6}, {"hidden": 30, "heads": 5, "head_dim": 6}),
        ({"heads": 3, "hidden": 18}, {"hidden": 18, "heads": 3, "head_dim": 6}),
    ],
)
def test_coupled_axes_are_cut_together(asked: dict[str, int], found: dict[str, int]) -> None:
    sizes = complete_target(Shape.of(TINY["gpt2"]), asked)
    assert {name: sizes[name] for name in found} == found


@pytest.mark.parametrize(
    "asked", [{"heads": 3, "hidden": 40}, {"heads": 3, "hidden": 20}, {"heads": 3, "kv_heads": 2}, {"hidden": 31}]
)
def test_coupled_axes_that_disagree_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ShapeError):
        complete_target(Shape.of(TINY["gpt2"]), asked)


def test_a_plan_of_sizes_keeps_no_units() -> None:
    shape = Shape.of(TINY["qwen3"])
    plan = size_plan(shape, {"layers": 2, "ffn": 28})
    assert (plan.layers, plan.keep, plan.sizes["ffn"]) == ([0, 1], {}, 28)
    assert plan.params_after < plan.params_before == shape.params


def test_a_layout_without_a_table_is_named() -> None:
    with pytest.raises(FamilyError, match="layout"):
        family_for({**TINY["stablelm"], "qk_layernorm": True})
    with pytest.raises(FamilyError, match="layout"):
        family_for({**TINY["opt"], "word_embed_proj_dim": 20})  # projected, yet normed before each sublayer


def republished(source: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    copy_companions(source, out)
    return out


def _logits_after(path: Path, out: Path, **target: Any) -> torch.Tensor:
    run_prune(PruneConfig(checkpoint=str(path), out=out, **target))
    return logits(out, IDS)


def test_gpt2_as_published(tmp_path: Path) -> None:
    """No module prefix, causal-mask buffers, a stored copy of the tied head."""
    source = make_model(tmp_path / "source", "gpt2")
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(source / "model.safetensors").items()
    }
    for layer in range(4):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    published = republished(source, tmp_path / "published", tensors)
    expected = _logits_after(source, tmp_path / "a", layers=3, heads=3)
    assert torch.equal(_logits_after(published, tmp_path / "b", layers=3, heads=3), expected)
    assert not any(name.endswith(".attn.bias") for name in load_file(tmp_path / "b" / "model.safetensors"))


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "falcon", "opt"])
def test_legacy_buffers_and_head_copies(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", family, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    table = family_for(json.loads((source / "config.json").read_text()))
    copy, original = next(iter(table.tied.items()))
    tensors[copy] = tensors[original].clone()
    buffers = {
        "gpt_neox": "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
        "qwen3": "model.layers.0.self_attn.rotary_emb.inv_freq",
        "falcon": "transformer.h.0.self_attention.rotary_emb.inv_freq",
    }
    if family in buffers:
        tensors[buffers[family]] = torch.ones(8)
    published = republished(source, tmp_path / "published", tensors)
    expected = _logits_after(source, tmp_path / "a", ffn=40)
    assert torch.equal(_logits_after(published, tmp_path / "b", ffn=40), expected)
