"""Phi-3 and Phi-4: Llama with queries, keys and values fused by concatenation, and gate and up likewise."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Rotary, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_QKV = "kv_heads*group*head_dim + kv_heads*head_dim + kv_heads*v_head_dim"

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    tensors={
        **without(LLAMA.tensors, ".bias", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        _LAYER + "self_attn.qkv_proj.weight": Tensor((_QKV, "hidden"), role="query"),
        # Phi3MLP: gate, up_states = up_states.chunk(2, dim=-1)
        _LAYER + "mlp.gate_up_proj.weight": Tensor(("2*ffn", "hidden")),
    },
    taps={
        **{kind: taps for kind, taps in LLAMA.taps.items() if kind not in ("query", "key", "value")},
        "qkv": (Tap(_LAYER + "self_attn.qkv_proj", "output", _QKV),),
    },
    defaults={"tie_word_embeddings": False},
    divides=LLAMA.divides[:1],
    norm=Norm(eps=1e-5),
    readers={
        **LLAMA.readers,
        _LAYER + "input_layernorm.weight": (_LAYER + "self_attn.qkv_proj.weight",),
        _LAYER + "post_attention_layernorm.weight": (_LAYER + "mlp.gate_up_proj.weight",),
    },
    rotary=Rotary(fraction_key="partial_rotary_factor"),
)
