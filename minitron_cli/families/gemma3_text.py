"""Gemma 3, text: Gemma 2 with query and key norms, one full layer in six, and rope parameters per layer type."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.gemma2 import GEMMA2
from minitron_cli.families.schema import LayerRule, Rotary, Tensor

_ATTENTION = "model.layers.{layer}.self_attn."
_WORDS = {"in": "full_attention", "out": "sliding_attention"}

GEMMA3_TEXT = replace(
    GEMMA2,
    name="gemma3_text",
    model_types=("gemma3_text",),
    tensors={
        **GEMMA2.tensors,
        # Neither carries the softmax scale, which is query_pre_attn_scalar**-0.5.
        _ATTENTION + "q_norm.weight": Tensor(("head_dim",), role="norm"),
        _ATTENTION + "k_norm.weight": Tensor(("head_dim",), role="norm"),
    },
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            # sliding_window_pattern is consumed by the constructor, which leaves no trace of it but the layer types.
            absent=LayerRule(
                "sliding_window_pattern", "period", _WORDS, absent=LayerRule("", "period", _WORDS, fixed=6)
            ),
        ),
    ),
    rotary=Rotary(
        sections={"full_attention": ("rope_theta", 1000000.0), "sliding_attention": ("rope_local_base_freq", 10000.0)}
    ),
)
