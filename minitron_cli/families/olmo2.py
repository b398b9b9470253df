"""OLMo 2: norms after each sublayer, and one norm over all query channels, another over all key channels."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Tap, Tensor, unscaled, without

_LAYER = "model.layers.{layer}."

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    tensors={
        **unscaled(
            without(LLAMA.tensors, "input_layernorm", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
        ),
        _LAYER + "post_feedforward_layernorm.weight": Tensor(("hidden",), role="norm"),
        # Statistics over all heads at once.
        _LAYER + "self_attn.q_norm.weight": Tensor(("kv_heads*group*head_dim",), role="query_norm"),
        _LAYER + "self_attn.k_norm.weight": Tensor(("kv_heads*head_dim",), role="norm"),
    },
    taps={
        **LLAMA.taps,
        "hidden": (
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_feedforward_layernorm", "output", "hidden"),
        ),
    },
    defaults={"tie_word_embeddings": False, "attention_bias": False},
    divides=LLAMA.divides[:1],
    readers={},
    post_norms=True,
    norm=Norm(eps=1e-5),
)
