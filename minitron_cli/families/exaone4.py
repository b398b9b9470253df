"""EXAONE 4: norms after each sublayer and over the channels of each query and key head; full layers do not rotate."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.olmo2 import OLMO2
from minitron_cli.families.schema import LayerRule, Tensor, without

_ATTENTION = "model.layers.{layer}.self_attn."

EXAONE4 = replace(
    OLMO2,
    name="exaone4",
    model_types=("exaone4",),
    tensors={
        **without(OLMO2.tensors, ".bias", "q_norm", "k_norm"),
        _ATTENTION + "q_norm.weight": Tensor(("head_dim",), role="query_norm"),
        _ATTENTION + "k_norm.weight": Tensor(("head_dim",), role="norm"),
    },
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 32, "sliding_window_pattern": 4},
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule("sliding_window_pattern", "period", {"in": "full_attention", "out": "sliding_attention"}),
        ),
    ),
)
