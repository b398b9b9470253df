"""Qwen2 and Qwen2.5: Llama's tensors with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import LayerRule, without

# Qwen2Config: layers from max_window_layers on slide, where windows are switched on and have a size.
WINDOWS = LayerRule(
    "layer_types",
    "list",
    absent=LayerRule(
        "use_sliding_window",
        "flag",
        {
            "in": LayerRule(
                "sliding_window",
                "flag",
                {
                    "in": LayerRule(
                        "max_window_layers", "leading", {"in": "full_attention", "out": "sliding_attention"}
                    ),
                    "out": "full_attention",
                },
                absent="full_attention",
            ),
            "out": "full_attention",
        },
    ),
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_types=("qwen2",),
    tensors={
        name: replace(tensor, conditions=()) if name.endswith("_proj.bias") else tensor
        for name, tensor in without(
            LLAMA.tensors, "o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"
        ).items()
    },
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    layer_rules=(WINDOWS,),
    divides=LLAMA.divides[:1],
)
