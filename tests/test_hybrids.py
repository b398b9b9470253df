"""Mamba-2 and linear attention: nested scores, layers of several kinds, files as published, the whole chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import logits, make_model
from helpers_align import make_prompts
from helpers_chain import make_data
from helpers_tokenizer import make_tokenizer
from oracle import masked_original
from safetensors.torch import load_file, save_file
from tiny import NO_NORM, PERIODS, TINY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from minitron_cli.align.stage import plan_align
from minitron_cli.checkpoint.inspect import inspect_checkpoint
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.config.align import AlignConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.stage import run_distill
from minitron_cli.errors import CheckpointError, FamilyError, ShapeError
from minitron_cli.importance.layout import CELLS, SCORES
from minitron_cli.importance.nested import NestedScores
from minitron_cli.importance.stage import run_importance
from minitron_cli.models.taps import listening, place_taps
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune.edit import Edit
from minitron_cli.prune.plan import make_plan, size_plan
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.search.stage import run_search
from minitron_cli.shape import Shape

IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def cells_by_hand(path: Path, layer: int) -> np.ndarray:
    """|x| averaged over tokens and L2 over sequences, from the rows of the weights that make x."""
    config = json.loads((path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        entering = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[layer]
        block = model.model.layers[layer]
        if config["model_type"] == "qwen3_next":
            heads, group, channels = 4, 2, config["linear_value_head_dim"]
            weight = block.linear_attn.in_proj_qkvz.weight.view(heads, -1, config["hidden_size"])
            keys = 2 * config["linear_key_head_dim"]
            rows = weight[:, keys : keys + group * channels].reshape(heads * group * channels, -1)
            x = block.input_layernorm(entering) @ rows.T
        else:
            heads, group, channels = 4, 4, config["mamba_head_dim"]
            inner = heads * group * channels
            projection = block.mixer.in_proj
            x = block.norm(entering) @ projection.weight[inner : 2 * inner].T + projection.bias[inner : 2 * inner]
    return x.abs().mean(1).square().sum(0).sqrt().view(heads, group, channels).double().numpy()


def nested_scores(path: Path) -> tuple[Shape, dict[str, np.ndarray]]:
    shape = Checkpoint(path).shape
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    taps = list(place_taps(model, shape, ("nested",)))
    scores = NestedScores(shape, taps, "l2", "mean")
    with listening(taps, scores.heard), torch.inference_mode():
        model(IDS, use_cache=False)
    return shape, scores.scores()


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next"])
def test_cells_are_those_of_the_projection(family: str, tmp_path: Path) -> None:
    shape, scores = nested_scores(make_model(tmp_path, family))
    channels, members, groups = shape.family.nested
    for layer in range(shape["layers"]):
        if layer not in shape.layers_with(members):
            assert not scores[CELLS][layer].any()
            continue
        cells = cells_by_hand(tmp_path, layer)
        np.testing.assert_allclose(scores[CELLS][layer], cells, rtol=2e-5)
        np.testing.assert_allclose(scores[channels][layer], np.sqrt((cells**2).sum((0, 1))), rtol=2e-5)
        np.testing.assert_allclose(scores[members][layer], np.sqrt((cells**2).sum(2)), rtol=2e-5)
        np.testing.assert_allclose(scores[groups][layer], np.sqrt((cells**2).sum((1, 2))), rtol=2e-5)


def test_heads_are_ranked_inside_their_group_over_the_channels_that_stay() -> None:
    """Minitron-SSM step by step: a head that is loud in dropped channels alone leaves, whatever its whole norm."""
    shape = Shape.of(TINY["nemotron_h"])
    layers, groups, members, channels = shape["layers"], 4, 4, 10
    cells = np.random.default_rng(0).uniform(1.0, 2.0, (layers, groups, members, channels))
    cells[..., 7:] *= 0.1
    # Of the first group, member 2 is quiet but in a channel that leaves; the whole last group is loud.
    cells[:, 0, 2, :7] = 0.5
    cells[:, 0, 2, 9] = 40.0
    cells[:, 3] *= 3.0
    cells[:, :, :, 9] *= 0.2
    mamba = sorted(shape.layers_with("mamba_heads") | shape.layers_with("mamba_group"))
    scores = {CELLS: cells, "layers": np.arange(layers, dtype=float)}
    target = {"mamba_head_dim": 7, "mamba_heads": 12}
    plan = make_plan(shape, scores, target, ranked_by="cells")
    for layer in mamba:
        kept = plan.kept(layer)
        by_channel = np.sqrt((cells[layer] ** 2).sum((0, 1)))
        channels_kept = np.sort(np.argsort(-by_channel)[:7])
        assert kept["mamba_head_dim"].tolist() == channels_kept.tolist() and 9 not in channels_kept
        for group in range(groups):
            norms = np.sqrt((cells[layer, group][:, channels_kept] ** 2).sum(1))
            assert kept["mamba_group"][group].tolist() == sorted(np.argsort(-norms)[:3].tolist())
        assert 2 not in kept["mamba_group"][0]
    assert plan.keep["mamba_group"][1] == plan.keep["mamba_head_dim"][1] == [], "an MLP has no heads"
    whole = make_plan(shape, scores, {"mamba_heads": 12}, ranked_by="cells").kept(mamba[0])
    assert 2 in whole["mamba_group"][0], "with all channels it is the loudest of its group"


def test_layers_leave_by_kind_in_every_spelling() -> None:
    """A pattern stays a pattern, lists stay lists, what only a period said is written out; one attention stays."""
    pattern = "M-M*ME-"
    config = {**TINY["nemotron_h"], "hybrid_override_pattern": pattern}
    del config["layers_block_type"]
    shape = Shape.of(config)
    assert shape["layers"] == 7
    cut = new_config(config, shape.family, {**shape.sizes, "layers": 4}, [0, 3, 4, 5])
    assert cut["hybrid_override_pattern"] == "M*ME" and "layers_block_type" not in cut
    assert AutoConfig.for_model(**cut).layers_block_type == [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "moe",
    ]
    both = {**config, "layers_block_type": AutoConfig.for_model(**config).layers_block_type}
    cut = new_config(both, shape.family, {**shape.sizes, "layers": 2}, [3, 6])
    assert cut["hybrid_override_pattern"] == "*-" and cut["layers_block_type"] == ["full_attention", "mlp"]

    periods = {**PERIODS, "model_type": "qwen3_next"}
    shape = Shape.of(periods)
    cut = new_config(periods, shape.family, {**shape.sizes, "layers": 3}, [0, 2, 3])
    assert cut["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
    assert (cut["mlp_only_layers"], cut["decoder_sparse_step"]) == ([0, 1], 1)
    with pytest.raises(ShapeError, match=r"no full attention layer \(those are 2\), .* needs one \(DynamicCache"):
        size_plan(shape, {}, drop_layers=(2,))
    kept = make_plan(shape, {"layers": np.array([3.0, 2.0, 0.0, 1.0])}, {"layers": 2}, ranked_by="x").layers
    assert kept == [0, 2], "the only attention layer stays, though it scores lowest"


def test_falcon_h1_without_its_norm(tmp_path: Path) -> None:
    """As most of them were published: nothing divides by what stays, so that the mask alone is the same function."""
    source = make_model(tmp_path / "model", "falcon_h1", **{**NO_NORM, "tie_word_embeddings": False})
    config = PruneConfig(
        checkpoint=str(source), out=tmp_path / "cut", mamba_groups=3, mamba_heads=6, mamba_head_dim=8, head_dim=12
    )
    plan = plan_prune(config)
    run_prune(config)
    pruned = logits(tmp_path / "cut", IDS)
    masked = masked_original(source, plan, tmp_path / "masked").logits(IDS)
    control = masked_original(source, plan, tmp_path / "control", rotate=1).logits(IDS)
    assert (pruned - masked).abs().max() < 2e-4 * masked.abs().max()
    assert (pruned - control).abs().max() > 1e-2 * masked.abs().max()


def test_axes_that_a_model_has_none_of() -> None:
    shape = Shape.of({**TINY["nemotron_h"], "layers_block_type": ["linear_attention", "mlp", "full_attention"]})
    assert "experts" not in shape.shown() and "expert_latent" not in shape.shown()
    with pytest.raises(ShapeError, match="--experts: no layer of this nemotron_h model has any"):
        size_plan(shape, {"experts": 2})


def test_extras_of_multi_token_prediction_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "model", "nemotron_h")
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.layers.0.eh_proj.weight": torch.ones(4, 4), "mtp.layers.0.norm.weight": torch.ones(4)}
    save_file({**tensors, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert any(note.startswith("2 tensors: multi-token") for note in inspect_checkpoint(str(source))["notes"])
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "out", mamba_heads=8))
    assert "2 tensors are left out: multi-token-prediction" in capsys.readouterr().err
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "mtp" in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("config_too", [False, True])
def test_a_slice_that_does_nothing_is_caught(config_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published once as three models that were one: real counts stand between a cut and its export."""
    source = make_model(tmp_path / "model", "nemotron_h")
    honest = Edit.selections

    def lazy(self: Edit, *, whole: str = "") -> Any:
        sizes = self.shape.family.tensor_shape(self.tensor, self.shape.sizes)
        return [np.arange(size) for size in sizes] if ".mixer." in self.name else honest(self, whole=whole)

    monkeypatch.setattr(Edit, "selections", lazy)
    if config_too:
        for module in ("execute", "stage"):
            monkeypatch.setattr(f"minitron_cli.prune.{module}.planned_config", lambda shape, plan: shape.config)
    message = "the stock class has .*, the plan said" if config_too else "mixer.* the cut leaves .*, the plan said"
    with pytest.raises(CheckpointError, match=message):
        run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "out", mamba_heads=8))
    assert not (tmp_path / "out").exists()


def stack_experts(path: Path) -> None:
    """Rewrite a checkpoint as Qwen3.5 was published: one tensor for gate and up of all experts, one for down."""
    tensors = load_file(path / "model.safetensors")
    count = json.loads((path / "config.json").read_text())["num_experts"]
    for name in [name for name in tensors if ".experts.0.gate_proj." in name]:
        base = name.split(".experts.0.")[0] + ".experts."
        parts = [
            [tensors.pop(f"{base}{e}.{kind}_proj.weight") for e in range(count)] for kind in ("gate", "up", "down")
        ]
        tensors[base + "gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], dim=1)
        tensors[base + "down_proj"] = torch.stack(parts[2])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_experts_stacked_on_disk_are_cut_alike(tmp_path: Path) -> None:
    apart = make_model(tmp_path / "apart", "qwen3_5_moe_text")
    stacked = make_model(tmp_path / "stacked", "qwen3_5_moe_text")
    stack_experts(stacked)
    cut = {"experts": 3, "expert_ffn": 16, "hidden": 32, "linear_value_heads": 4}
    plans = []
    for source in (apart, stacked):
        config = PruneConfig(checkpoint=str(source), out=source.with_suffix(".cut"), **cut)
        plans.append(plan_prune(config))
        run_prune(config)
    assert plans[0].keep == plans[1].keep
    stack_experts(tmp_path / "apart.cut")
    one, other = (load_file(tmp_path / f"{name}.cut" / "model.safetensors") for name in ("apart", "stacked"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked.cut", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_qwen3_5_inside_its_multimodal_model(tmp_path: Path) -> None:
    """As published: experts stacked, multi-token-prediction extras beside the decoder, sections for images."""
    text = {**TINY["qwen3_5_moe_text"], "mtp_num_hidden_layers": 1}
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]
    }  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=24, depth=1, num_heads=2, out_hidden_size=40, patch_size=4)
    config = AutoConfig.for_model(
        "qwen3_5_moe", text_config=text, vision_config=vision, image_token_id=60, video_token_id=61,
        vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    torch.manual_seed(0)
    source = tmp_path / "whole"
    AutoModelForMultimodalLM.from_config(config).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(3, 3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((source / "config.json").read_text())
    told["text_config"]["mtp_num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(told))
    found = inspect_checkpoint(str(source))
    assert found["family"] == "qwen3_5_moe_text" and {"hidden", "head_dim"}.isdisjoint(found["axes"])
    with pytest.raises(ShapeError, match="places in images turn sections of its channels; cut it with --text-only"):
        plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "x", head_dim=8))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "cut", linear_value_heads=4, experts=3))
    after = json.loads((tmp_path / "cut" / "config.json").read_text())["text_config"]
    assert (after["linear_num_value_heads"], after["num_experts"], after["mtp_num_hidden_layers"]) == (4, 3, 0)
    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not info["missing_keys"] and "mtp.fc.weight" not in load_file(tmp_path / "cut" / "model.safetensors")
    assert any("visual" in name for name, _ in model.named_parameters())


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny hybrid of all four kinds of layers with a tokenizer, data and scores."""
    root = tmp_path_factory.mktemp("hybrid")
    make_tokenizer(root / "model")
    vocab = len(load_tokenizer(root / "model"))
    kinds = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
    make_model(root / "model", "nemotron_h-latent", vocab_size=vocab, layers_block_type=kinds, n_group=1)
    data = make_data(root / "data", root / "model")
    run_importance(ImportanceConfig(checkpoint=str(root / "model"), data=data, out=root / "scores", samples=16))
    return {"model": root / "model", "data": data, "scores": root / "scores"}


def test_from_scores_to_a_distilled_model(scored: dict[str, Path], tmp_path: Path) -> None:
    streamed = ImportanceConfig(
        checkpoint=str(scored["model"]), data=scored["data"], out=tmp_path / "streamed", samples=16, stream=True
    )
    run_importance(streamed)
    one, other = load_file(scored["scores"] / SCORES), load_file(tmp_path / "streamed" / SCORES)
    assert CELLS in one and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=0)
    cut = PruneConfig(
        checkpoint=str(scored["model"]), importance=scored["scores"], out=tmp_path / "pruned", layers=5, hidden=36,
        mamba_heads=8, mamba_head_dim=8, experts=6, expert_ffn=16, expert_latent=32, data=scored["data"],
    )  # fmt: skip
    pruned = run_prune(cut)
    distilled = run_distill(
        DistillConfig(
            student=str(cut.out), teacher=str(scored["model"]), data=scored["data"], out=tmp_path / "student", steps=6,
            batch_size=4, lr=3e-3, eval_every=6,
        )
    )  # fmt: skip
    assert distilled.val_loss_after < distilled.val_loss_before
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == pruned.params_after < pruned.params_before


def test_alignment_refuses_what_padding_changes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "biased")
    make_model(tmp_path / "biased", "nemotron_h", vocab_size=len(load_tokenizer(tmp_path / "biased")))
    prompts = make_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(FamilyError, match="prompts of several lengths: the mixer's in_proj adds its bias to padding"):
        plan_align(
            AlignConfig(
                policy=str(tmp_path / "biased"), prompts=prompts, reward="length:9", out=tmp_path / "x", steps=1
            )
        )  # fmt: skip


def test_a_search_counts_the_layers_that_really_stay(scored: dict[str, Path], tmp_path: Path) -> None:
    """Layers of several kinds are of several sizes: candidates are counted with those that scores keep."""
    checkpoint = Checkpoint(scored["model"])
    result = run_search(
        SearchConfig(
            checkpoint=str(scored["model"]), importance=scored["scores"], data=scored["data"], out=tmp_path / "search",
            params="60%", tolerance="30%", grid=("layers=3..5", "mamba-heads=8,16"), finalists=0, eval_sequences=4,
        )
    )  # fmt: skip
    assert {row["shape"]["mamba_heads"] for row in result.candidates} == {8, 16}
    for row in result.candidates:
        plan = plan_prune(
            PruneConfig(
                checkpoint=str(scored["model"]), importance=scored["scores"], out=tmp_path / "x",
                layers=row["shape"]["layers"], mamba_heads=row["shape"]["mamba_heads"],
            )
        )  # fmt: skip
        assert row["params"] == plan.params_after
    first = [
        new_config(checkpoint.config, checkpoint.shape.family, {**checkpoint.shape.sizes, "layers": 4}, [0, 1, 2, 3])
    ]
    assert Shape.of(first[0]).params not in {row["params"] for row in result.candidates}
