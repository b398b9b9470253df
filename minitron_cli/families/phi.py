"""Phi-1 and Phi-2: parallel residual after one LayerNorm, ungated MLP, half of each head rotated, a biased head."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Axis, Norm, Rotary, Tap, Tensor, unscaled, without

_LAYER = "model.layers.{layer}."
_NORMED = ("qk_layernorm",)

PHI = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    when=("!qk_layernorm",),
    tensors={
        **{
            name: replace(tensor, conditions=()) if name.endswith("_proj.bias") else tensor
            for name, tensor in without(
                LLAMA.tensors, "o_proj", ".mlp.", "post_attention_layernorm", "model.norm"
            ).items()
        },
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "self_attn.dense.weight": Tensor(("hidden", "kv_heads*group*v_head_dim")),
        _LAYER + "self_attn.dense.bias": Tensor(("hidden",)),
        _LAYER + "mlp.fc1.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.fc1.bias": Tensor(("ffn",)),
        _LAYER + "mlp.fc2.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.fc2.bias": Tensor(("hidden",)),
        "model.final_layernorm.weight": Tensor(("hidden",), role="norm"),
        "model.final_layernorm.bias": Tensor(("hidden",)),
        "lm_head.bias": Tensor(("vocab",)),
    },
    taps={
        "hidden": (Tap(_LAYER + "input_layernorm", "output", "hidden"),),
        "attention": (Tap(_LAYER + "self_attn.dense", "input", "kv_heads*group*v_head_dim"),),
        "ffn": (Tap(_LAYER + "mlp.fc2", "input", "ffn"),),
        **{kind: LLAMA.taps[kind] for kind in ("mlp", "query", "key", "value", "block", "head")},
    },
    defaults={"tie_word_embeddings": False, "qk_layernorm": False},
    divides=LLAMA.divides[:1],
    readers={},
    norm=Norm("layer", "layer_norm_eps", eps=1e-5),
    rotary=Rotary(fraction=0.5, fraction_key="partial_rotary_factor"),
)

PHI_NORMED = replace(
    PHI,
    name="phi_normed",
    when=_NORMED,
    tensors={
        **unscaled(PHI.tensors),
        _LAYER + "self_attn.q_layernorm.weight": Tensor(("head_dim",), role="query_norm"),
        _LAYER + "self_attn.q_layernorm.bias": Tensor(("head_dim",), role="query"),
        _LAYER + "self_attn.k_layernorm.weight": Tensor(("head_dim",), role="norm"),
        _LAYER + "self_attn.k_layernorm.bias": Tensor(("head_dim",)),
    },
    # PhiAttention: q_layernorm = nn.LayerNorm(config.hidden_size // config.num_attention_heads, ...)
    axes=PHI.axes_with(Axis("head_dim", default="hidden // heads", prunable=True)),
    coupled={"hidden": "heads*head_dim"},
)
