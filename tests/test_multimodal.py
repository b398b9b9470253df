"""The text part of multimodal checkpoints: cut in place, or extracted; both equal the masked original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits
from oracle import masked_original
from safetensors.torch import load_file, save_file
from tiny import TINY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from typer.testing import CliRunner

from minitron_cli.checkpoint.inspect import inspect_checkpoint
from minitron_cli.checkpoint.multimodal import open_checkpoint, open_shape
from minitron_cli.checkpoint.verify import check_structure, verify
from minitron_cli.cli.app import app
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import FamilyError, UserError
from minitron_cli.models.load import stock_config
from minitron_cli.prune.stage import plan_prune, run_prune

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": dict(
        text_config=TINY["gemma3_text"], vision_config=dict(model_type="siglip_vision_model", **VISION),
        mm_tokens_per_image=4, image_token_index=66, boi_token_index=64, eoi_token_index=65,
    ),
    "llava": dict(
        text_config=TINY["llama"], vision_config=dict(model_type="clip_vision_model", **VISION), image_token_index=66
    ),
    # The wrapper ties, the section says otherwise; the reverse of what the key there suggests.
    "mistral3": dict(
        text_config={**TINY["mistral"], "tie_word_embeddings": False}, image_token_index=66,
        vision_config=dict(model_type="pixtral", head_dim=8, **VISION),
    ),
    "idefics3": dict(text_config=TINY["llama"], vision_config=VISION, image_token_id=66, scale_factor=2),
}  # fmt: skip
CUTS = {"ffn": dict(ffn=40), "heads": dict(heads=3), "kv_heads": dict(kv_heads=2), "layers": dict(drop_layers=(1,))}
EVERYTHING = dict(ffn=40, heads=2, kv_heads=2, head_dim=8, layers=3)


def make_wrapped(path: Path, name: str) -> Path:
    config = AutoConfig.for_model(name, **WRAPPERS[name])
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(path)
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each tiny multimodal model, saved once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_wrapped(tmp_path_factory.mktemp("wrapped") / name, name)
        return made[name]

    return get


def wrapped_logits(path: Path) -> torch.Tensor:
    """Logits of the stock multimodal class on text alone, every weight found."""
    model, info = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def prune(source: Path, out: Path, **options: Any) -> Path:
    run_prune(PruneConfig(checkpoint=str(source), out=out, **options))
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return bool((one - other).abs().max() < tolerance * other.abs().max())


@pytest.mark.parametrize("name", WRAPPERS)
def test_extracted_is_the_wrapped_text_model(name: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    source = wrapped(name)
    out = prune(source, tmp_path / "text", text_only=True)
    config = json.loads((out / "config.json").read_text())
    section = json.loads((source / "config.json").read_text())["text_config"]
    assert config["model_type"] == section["model_type"]
    assert config["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert config["architectures"] == [type(model).__name__]
    assert config["tie_word_embeddings"] == (model.get_input_embeddings().weight is model.lm_head.weight)
    assert (out / "tokenizer_config.json").exists()
    assert same(logits(out, IDS), wrapped_logits(source), 1e-9)
    # Nothing but names changed.
    before = {tensor.numpy().tobytes() for tensor in weights(source).values()}
    assert all(tensor.numpy().tobytes() in before for tensor in weights(out).values())


@pytest.mark.parametrize(("name", "case"), [*((name, "ffn") for name in WRAPPERS), *(("gemma3", c) for c in CUTS)][1:])
def test_in_place_equals_masked_original(name: str, case: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    source = wrapped(name)
    config = PruneConfig(checkpoint=str(source), out=tmp_path / "pruned", **CUTS[case])
    plan = plan_prune(config)
    result = run_prune(config)
    text = prune(source, tmp_path / "text", text_only=True)
    pruned = wrapped_logits(tmp_path / "pruned")
    assert same(pruned, masked_original(text, plan, tmp_path / "masked").logits(IDS))
    control = masked_original(text, plan, tmp_path / "control", rotate=1).logits(IDS)
    assert case == "layers" or not same(pruned, control, 1e-2)
    check_untouched(source, tmp_path / "pruned", set(plan.sizes), result.shape["layers"])


def check_untouched(source: Path, out: Path, axes: set[str], layers: int) -> None:
    """Everything outside the text part is as it was: tensors by their bytes, config.json by its keys."""
    before, after = weights(source), weights(out)
    outside = {entry.name for entry in open_checkpoint(source).outside}  # type: ignore[attr-defined]
    assert outside and outside == {entry.name for entry in open_checkpoint(out).outside}  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in outside)
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, out))
    assert {**old, "text_config": None} == {**new, "text_config": None}
    assert old["text_config"].keys() == new["text_config"].keys()
    assert new["text_config"]["num_hidden_layers"] == layers


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_every_axis_of_the_extracted_model(name: str, wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    source = wrapped(name)
    config = PruneConfig(checkpoint=str(source), out=tmp_path / "small", text_only=True, hidden=36, **EVERYTHING)
    plan = plan_prune(config)
    run_prune(config)
    text = prune(source, tmp_path / "text", text_only=True)
    assert same(logits(tmp_path / "small", IDS), masked_original(text, plan, tmp_path / "masked").logits(IDS))


def test_newer_names_on_disk(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    """The other spelling of the same files, several axes, and a plan made on the extracted model."""
    source = wrapped("llava")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "config.json").write_bytes((source / "config.json").read_bytes())
    moved = {
        "model." + name.replace("language_model.model.", "language_model."): tensor
        for name, tensor in weights(source).items()
    }
    moved["lm_head.weight"] = moved.pop("model.language_model.lm_head.weight")
    save_file(moved, tmp_path / "newer" / "model.safetensors", metadata={"format": "pt"})
    older = prune(source, tmp_path / "a", **EVERYTHING)
    text = prune(tmp_path / "newer", tmp_path / "text", text_only=True)
    plan = plan_prune(PruneConfig(checkpoint=str(text), out=tmp_path / "x", **EVERYTHING))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    newer = prune(tmp_path / "newer", tmp_path / "b", plan=tmp_path / "plan.json")
    assert "model.language_model.layers.2.mlp.up_proj.weight" in weights(newer)
    assert torch.equal(wrapped_logits(older), wrapped_logits(newer))


def test_sizes_that_a_published_config_leaves_out(tmp_path: Path) -> None:
    """Files of older libraries hold only what differs from the class's defaults; a cut writes what it must."""
    section = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7}
    values = {"model_type": "gemma3", "text_config": section, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(stock_config(values))
    shape = open_shape(tmp_path)
    assert shape.params == sum(parameter.numel() for parameter in model.get_decoder().parameters())
    assert (shape["heads"], shape["kv_heads"], shape["head_dim"], shape["vocab"]) == (8, 4, 256, 262208)
    found = inspect_checkpoint(str(tmp_path))
    assert found["params"] == shape.params
    assert plan_prune(PruneConfig(checkpoint=str(tmp_path), out=tmp_path / "x", ffn=64)).params_after < shape.params


def test_inspect_and_verify(wrapped: Callable[[str], Path]) -> None:
    source = wrapped("gemma3")
    found = inspect_checkpoint(str(source))
    outside = sum(t.numel() for name, t in weights(source).items() if not name.startswith("language_model"))
    assert f"{outside:,} parameters lie outside the text part" in found["notes"]
    assert found["family"] == "gemma3_text" and found["params"] == check_structure(source)
    assert "ffn" in found["axes"] and "hidden" not in found["axes"]
    assert verify(source)["finite"]


@pytest.mark.parametrize("options", [["--hidden", "36"], ["--hidden", "36", "--dry-run"]])
def test_shared_axes_stay_in_place(options: list[str], wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prune", str(wrapped("llava")), "--out", str(tmp_path / "x"), *options])
    assert done.exit_code == 2
    assert "--text-only" in done.stderr and "hidden" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_saved_plan_may_not_cut_shared_axes(wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "x"
    plan = plan_prune(PruneConfig(checkpoint=str(wrapped("llava")), out=out, text_only=True, hidden=36))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    with pytest.raises(UserError, match="--text-only"):
        plan_prune(PruneConfig(checkpoint=str(wrapped("llava")), out=out, plan=tmp_path / "plan.json"))


def test_text_only_of_a_text_model(llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prune", str(llama), "--out", str(tmp_path / "x"), "--text-only"])
    assert done.exit_code == 2
    assert "leave out --text-only" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["importance", "CKPT", "--data", "D"],
        ["search", "CKPT", "--importance", "D", "--data", "D", "--params", "1000"],
        ["distill", "CKPT", "--teacher", "CKPT", "--data", "D", "--steps", "1"],
        ["eval", "CKPT", "--data", "D"],
    ],
    ids=lambda words: words[0],
)
def test_other_stages_name_the_extraction(command: list[str], wrapped: Callable[[str], Path], tmp_path: Path) -> None:
    places = {"CKPT": str(wrapped("llava")), "D": str(tmp_path)}
    done = CliRunner().invoke(app, [*(places.get(word, word) for word in command), "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "--text-only" in done.stderr


def test_an_undeclared_tensor_of_the_text_part_is_not_passed_over(
    wrapped: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = weights(wrapped("gemma3"))
    tensors["language_model.model.layers.1.gate.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((wrapped("gemma3") / "config.json").read_bytes())
    with pytest.raises(FamilyError, match="gate"):
        plan_prune(PruneConfig(checkpoint=str(tmp_path), out=tmp_path / "x", ffn=40))
