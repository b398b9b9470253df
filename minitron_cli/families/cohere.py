"""Cohere: parallel residual after one LayerNorm without bias, interleaved rotation, scaled logits, q/k norms."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Rotary, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_NORMED = ("use_qk_norm",)
_TABLE = without(
    LLAMA.tensors, "post_attention_layernorm", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"
)
_QUERIES = {
    # Where queries are normed, the norm's weight carries the softmax scale instead.
    name: replace(tensor, conditions=(*tensor.conditions, "!use_qk_norm"), otherwise=replace(tensor, role=""))
    for name, tensor in _TABLE.items()
    if tensor.role == "query"
}

COHERE = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere",),
    tensors={
        **_TABLE,
        **_QUERIES,
        # CohereLayerNorm(hidden_size=(num_heads, head_dim)): weights per head, statistics over head_dim.
        _LAYER + "self_attn.q_norm.weight": Tensor(
            ("kv_heads*group", "head_dim"), conditions=_NORMED, role="query_norm"
        ),
        _LAYER + "self_attn.k_norm.weight": Tensor(("kv_heads", "head_dim"), conditions=_NORMED, role="norm"),
    },
    taps={**LLAMA.taps, "hidden": (Tap(_LAYER + "input_layernorm", "output", "hidden"),)},
    defaults={"tie_word_embeddings": True, "attention_bias": False, "use_qk_norm": False},
    divides=LLAMA.divides[:1],
    readers={},
    norm=Norm("layer", "layer_norm_eps", eps=1e-5),
    rotary=Rotary(layout="interleaved", theta_default=500000.0),
)
