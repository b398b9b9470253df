"""Qwen3: Llama's tensors with a norm over the channels of each query and key head, and a head_dim of its own."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.qwen2 import QWEN2
from minitron_cli.families.schema import Tensor, unscaled, without

_ATTENTION = "model.layers.{layer}.self_attn."

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    tensors={
        **unscaled(without(LLAMA.tensors, "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")),
        # The norm undoes any factor on the projection, so the softmax scale is folded into its weight.
        _ATTENTION + "q_norm.weight": Tensor(("head_dim",), role="query_norm"),
        _ATTENTION + "k_norm.weight": Tensor(("head_dim",), role="norm"),
    },
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
)
