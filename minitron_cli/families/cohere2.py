"""Command R7B (cohere2): Cohere without query and key norms; windows with rotation, full attention without."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.cohere import COHERE
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import LayerRule, Rotary, without

_WORDS = {"in": "full_attention", "out": "sliding_attention"}

COHERE2 = replace(
    COHERE,
    name="cohere2",
    model_types=("cohere2",),
    tensors=without(
        LLAMA.tensors, "post_attention_layernorm", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"
    ),
    defaults={"tie_word_embeddings": True, "attention_bias": False},
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule(
                "sliding_window_pattern", "period", _WORDS, absent=LayerRule("", "period", _WORDS, fixed=4)
            ),
        ),
    ),
    rotary=Rotary(layout="interleaved"),
)
