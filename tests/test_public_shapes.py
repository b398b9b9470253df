"""Published models and the published students of the papers: sizes in, parameter totals out, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import CheckpointError
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.shape import Shape

NEMOTRON_4_15B: dict[str, Any] = dict(
    model_type="nemotron", num_hidden_layers=32, hidden_size=6144, num_attention_heads=48, num_key_value_heads=8,
    head_dim=128, intermediate_size=24576, vocab_size=256000, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_3_1_8B: dict[str, Any] = dict(
    model_type="llama", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
MISTRAL_NEMO: dict[str, Any] = dict(
    model_type="mistral", num_hidden_layers=40, hidden_size=5120, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, intermediate_size=14336, vocab_size=131072, tie_word_embeddings=False,
)  # fmt: skip

STUDENTS: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
    "Minitron-8B": (NEMOTRON_4_15B, {"hidden": 4096, "heads": 48, "ffn": 16384}, 8_271_699_968),
    "Minitron-4B": (NEMOTRON_4_15B, {"hidden": 3072, "heads": 24, "ffn": 9216}, 4_190_509_056),
    "Llama-3.1-Minitron-4B-Width": (LLAMA_3_1_8B, {"hidden": 3072, "ffn": 9216}, 4_512_746_496),
    "Llama-3.1-Minitron-4B-Depth": (LLAMA_3_1_8B, {"layers": 16}, 4_540_469_248),
    "MN-Minitron-8B": (MISTRAL_NEMO, {"hidden": 4096, "ffn": 11520}, 8_414_105_600),
}
"""Student to (its original, the sizes asked for, the parameters of the stock class)."""


def config_only(directory: Path, config: dict[str, Any]) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("student", STUDENTS)
def test_published_students(student: str, tmp_path: Path) -> None:
    original, target, params = STUDENTS[student]
    config = PruneConfig(checkpoint=config_only(tmp_path / "original", original), out=tmp_path / "x", **target)
    plan = plan_prune(config)
    assert plan.params_after == params
    assert plan.params_before == Shape.of(original).params
    assert {name: plan.sizes[name] for name in target} == target
    assert plan.keep == {}


def test_sizes_alone_cannot_be_executed(tmp_path: Path) -> None:
    config = PruneConfig(checkpoint=config_only(tmp_path / "original", TINY["llama"]), out=tmp_path / "out", ffn=40)
    with pytest.raises(CheckpointError, match="no safetensors"):
        run_prune(config)
    assert not (tmp_path / "out").exists()


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248),
    "Mistral-Nemo-Base-2407": (MISTRAL_NEMO, 12_247_782_400),
    "Qwen2.5-3B": (
        dict(
            model_type="qwen2", num_hidden_layers=36, hidden_size=2048, num_attention_heads=16, num_key_value_heads=2,
            intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True,
        ),
        3_085_938_688,
    ),
    "Qwen3-8B": (
        dict(
            model_type="qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
    "gemma-2-9b": (
        dict(
            model_type="gemma2", num_hidden_layers=42, hidden_size=3584, num_attention_heads=16, num_key_value_heads=8,
            head_dim=256, intermediate_size=14336, vocab_size=256000,
        ),
        9_241_705_984,
    ),
    "gpt2": (dict(model_type="gpt2", n_layer=12, n_embd=768, n_head=12, vocab_size=50257), 124_439_808),
    "pythia-410m": (
        dict(
            model_type="gpt_neox", num_hidden_layers=24, hidden_size=1024, num_attention_heads=16,
            intermediate_size=4096, vocab_size=50304,
        ),
        405_334_016,
    ),
    "opt-1.3b": (
        dict(
            model_type="opt", num_hidden_layers=24, hidden_size=2048, num_attention_heads=32, ffn_dim=8192,
            vocab_size=50272, max_position_embeddings=2048,
        ),
        1_315_758_080,
    ),
    "phi-2": (
        dict(
            model_type="phi", num_hidden_layers=32, hidden_size=2560, num_attention_heads=32, intermediate_size=10240,
            vocab_size=51200,
        ),
        2_779_683_840,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    config, params = PUBLISHED[name]
    assert Shape.of(config).params == params
