"""What is written is whole and finite, its companions come along, and `verify` says what will trouble serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from helpers_chain import make_checkpoint, make_data
from safetensors.torch import load_file, save_file
from tiny import TINY

from minitron_cli.checkpoint import blocks
from minitron_cli.checkpoint.companions import check_companions, companions, copy_companions
from minitron_cli.checkpoint.hub import WANTED, resolve
from minitron_cli.checkpoint.inspect import inspect_checkpoint
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.serving import WIDTHS, rows, serving_warnings
from minitron_cli.checkpoint.verify import check_contents, check_finite, verify
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.distill.stage import run_distill
from minitron_cli.errors import CheckpointError
from minitron_cli.importance.stage import run_importance
from minitron_cli.prune.stage import run_prune
from minitron_cli.runtime import memory
from minitron_cli.shape import Shape

WIDE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""Multiples that every engine likes."""


def spoil(path: Path, name: str, value: float, place: int = 0) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[place] = value
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", dtype=dtype)
    check_contents(path)
    spoil(path, "model.layers.2.mlp.up_proj.weight", value, place=-1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight .* not finite"):
        check_contents(path)


def test_the_last_value_of_a_chunked_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 28)
    for place in (0, 6, 7, 99, 100):
        values = torch.ones(101)
        values[place] = float("nan")
        save_file({"x": values, "ids": torch.arange(3)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"x in .* not finite"):
            check_finite(tmp_path / "x.safetensors")
    save_file({"x": torch.ones(101), "packed": torch.ones(9).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    check_finite(tmp_path / "x.safetensors")


def test_every_shard_is_read(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "many", ffn=40, shard_bytes=20_000))
    last = sorted((tmp_path / "many").glob("*.safetensors"))[-1]
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=last.name):
        check_contents(tmp_path / "many")


def test_prune_refuses_to_deliver_what_is_not_finite(tmp_path: Path) -> None:
    """The values that stay are the source's; NaN in a removed layer does not matter, in a kept one it does."""
    source = make_model(tmp_path / "source")
    spoil(source, "model.layers.1.mlp.up_proj.weight", float("nan"))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "without", drop_layers=(1,)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight .* not finite"):
        run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "with", drop_layers=(0,)))
    assert not (tmp_path / "with").exists()


COMPANIONS = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "terms",
    "LICENSE.md": "terms", "NOTICE.txt": "notice", "USE_POLICY.md": "policy", "generation_config.json": "{}",
}  # fmt: skip


def test_companions_come_along(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    for name, text in COMPANIONS.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("about another model")
    (source / "pytorch_model.bin").write_text("pickle")
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "out", ffn=40))
    found = {item.name for item in (tmp_path / "out").iterdir()}
    assert set(COMPANIONS) <= found and "pytorch_model.bin" not in found
    assert "about another model" not in (tmp_path / "out" / "README.md").read_text()
    assert all((tmp_path / "out" / name).read_text() == text for name, text in COMPANIONS.items())


def test_a_companion_that_is_missing_or_cut_is_named(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for name, text in COMPANIONS.items():
        (source / name).write_text(text)
    copy_companions(source, out)
    check_companions(source, out)
    assert [item.name for item in companions(source)] == sorted(COMPANIONS)
    (out / "chat_template.jinja").write_text("{{")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        check_companions(source, out)
    (out / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        check_contents(out, source=source)


def test_licences_are_downloaded() -> None:
    from fnmatch import fnmatch

    assert all(any(fnmatch(name, pattern) for pattern in WANTED) for name in COMPANIONS)


def warnings(path: Path, **changes: Any) -> list[str]:
    return serving_warnings(Shape.of({**WIDE, **changes}), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 1152, "num_attention_heads": 16}, ["hidden 1,152", "K-quants"]),
        ({"intermediate_size": 2880}, ["ffn 2,880", "blocks of 256"]),
        ({"intermediate_size": 2880}, ["ffn 2,880", "fp8", "128"]),
        ({"intermediate_size": 2850}, ["ffn 2,850", "multiple of 64", "tiles"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, ["12 heads", "by 8:", "tensor parallel"]),
        ({"num_attention_heads": 15, "num_key_value_heads": 5}, ["15 heads", "by 2, 4, 8:"]),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, ["6 KV heads", "by 4, 8 "]),
        ({"num_attention_heads": 21, "num_key_value_heads": 3}, ["3 KV heads", "by 2, 4, 8 "]),
        ({"head_dim": 72}, ["head_dim 72", "multiple of 16"]),
        ({"vocab_size": 1000}, ["vocab 1,000", "multiple of 64"]),
        ({"eos_token_id": 1024}, ["eos_token_id 1024", "outside"]),
        ({"eos_token_id": [5, 2000]}, ["eos_token_id 2000", "outside"]),
        ({}, ["no tokenizer"]),
    ],
)
def test_warnings_name_the_size_and_the_reason(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    found = [each for each in warnings(tmp_path, **changes) if all(word in each for word in words)]
    assert len(found) == 1, warnings(tmp_path, **changes)
    assert ":" in found[0]


def test_good_sizes_are_silent(tmp_path: Path) -> None:
    """Control: one warning is left, about the tokenizer that is not there; one KV head is copied, not split."""
    assert len(warnings(tmp_path)) == 1
    assert len(warnings(tmp_path, num_key_value_heads=1)) == 1


@pytest.mark.parametrize("name", TINY)
def test_every_family_has_rows(name: str, tmp_path: Path) -> None:
    """Warnings come from the shape, so families without intermediate_size or head_dim in their config have them too."""
    shape = Shape.of(TINY[name])
    widths = {name for name in WIDTHS if name in shape.sizes and name not in shape.absent}
    assert widths < rows(shape).keys() and len(rows(shape)) == len(widths) + 1
    assert "hidden" in widths and {"ffn", "expert_ffn"} & widths
    assert any("K-quants" in each for each in serving_warnings(shape, tmp_path))


def test_warnings_about_the_tokenizer(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "exact")
    vocab = Checkpoint(path).shape["vocab"]
    config = Checkpoint(path).config

    def about(size: int) -> list[str]:
        found = serving_warnings(Shape.of({**config, "vocab_size": size}), path)
        return [each for each in found if "token" in each]

    assert about(vocab) == []
    assert "padding" in about(vocab + 3)[0] and about(vocab + 3)[0].startswith("3 of")
    assert "highest ids" in about(vocab - 3)[0]


def test_verify_of_a_whole_checkpoint() -> None:
    found = verify(resolve("builtin:tiny-py"))
    assert (found["params"], found["loads"], found["finite"], found["ran"]) == (1443456, True, True, True)
    assert any("256" in each for each in found["warnings"])


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon-grouped"])
def test_verify_of_families_without_the_common_keys(family: str, tmp_path: Path) -> None:
    assert verify(make_model(tmp_path / "model", family))["warnings"]


def test_verify_where_the_model_does_not_fit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure and values are still checked; the forward pass is left out, and that is said."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    assert verify(llama)["ran"] is False
    spoil(llama, "model.norm.weight", float("nan"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        verify(llama)


def quantised_by_config(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def quantised_by_type(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def quantised_by_name(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("quantise", "words"),
    [(quantised_by_config, "fp8"), (quantised_by_type, "F8_E4M3"), (quantised_by_name, "weight_scale_inv")],
)
def test_quantised_checkpoints_are_counted_and_not_cut(
    quantise: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", path)
    params = inspect_checkpoint(str(path))["params"]
    quantise(path)
    stages: list[Callable[[], object]] = [
        lambda: run_prune(PruneConfig(checkpoint=str(path), out=tmp_path / "out", ffn=40)),
        lambda: run_importance(ImportanceConfig(checkpoint=str(path), data=data, out=tmp_path / "out", samples=4)),
        lambda: run_distill(
            DistillConfig(student=str(path), teacher=str(path), data=data, out=tmp_path / "out", steps=1)
        ),
    ]
    for stage in stages:
        with pytest.raises(CheckpointError, match=rf"quantised weights \(.*{words}.*bf16"):
            stage()
        assert not (tmp_path / "out").exists()
    if quantise is quantised_by_config:
        found = inspect_checkpoint(str(path))
        assert found["params"] == params and "bf16" in found["notes"][0]


def test_an_empty_quantisation_section_is_none(llama: Path) -> None:
    edit_config(llama, quantization_config=None)
    Checkpoint(llama).require_unquantised()


def test_legacy_masks_are_not_packed_weights(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "gpt2")
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    Checkpoint(path).require_unquantised()
