"""Qwen3-Next: gated attention every few layers, gated delta rule (linear attention) between, experts in most layers."""

from __future__ import annotations

from minitron_cli.families import delta_net
from minitron_cli.families.delta_net import GROUP, KEY_HEADS, VALUES
from minitron_cli.families.mixtral import GROUPED
from minitron_cli.families.qwen2_moe import QWEN2_MOE, ROUTED, SPARSE
from minitron_cli.families.schema import Axis, Divides, Family, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_ATTENTION, _LINEAR = _LAYER + "self_attn.", _LAYER + "linear_attn."
_FULL, _DELTA, _DENSE = ("full_attention",), ("linear_attention",), ("dense",)
_BIAS = ("attention_bias",)
_QUERY_GATE = "kv_heads*group*(head_dim + v_head_dim)"  # each query head, then its output gate
_KEY, _VALUE, _OUT = "kv_heads*head_dim", "kv_heads*v_head_dim", "kv_heads*group*v_head_dim"
# Of each key head: query, key, values, gates.
_QKVZ = f"{KEY_HEADS}*(linear_key_dim + linear_key_dim + {GROUP}*linear_value_dim + {GROUP}*linear_value_dim)"

GATED_ATTENTION: dict[str, Tensor] = {
    # The softmax scale is folded into q_norm, which the gate does not pass.
    _ATTENTION + "q_proj.weight": Tensor((_QUERY_GATE, "hidden"), tags=_FULL),
    _ATTENTION + "k_proj.weight": Tensor((_KEY, "hidden"), tags=_FULL),
    _ATTENTION + "v_proj.weight": Tensor((_VALUE, "hidden"), tags=_FULL),
    _ATTENTION + "o_proj.weight": Tensor(("hidden", _OUT), tags=_FULL),
    _ATTENTION + "q_proj.bias": Tensor((_QUERY_GATE,), tags=_FULL, conditions=_BIAS),
    _ATTENTION + "k_proj.bias": Tensor((_KEY,), tags=_FULL, conditions=_BIAS),
    _ATTENTION + "v_proj.bias": Tensor((_VALUE,), tags=_FULL, conditions=_BIAS),
    _ATTENTION + "o_proj.bias": Tensor(("hidden",), tags=_FULL, conditions=_BIAS),
    _ATTENTION + "q_norm.weight": Tensor(("head_dim",), tags=_FULL, role="query_norm"),
    _ATTENTION + "k_norm.weight": Tensor(("head_dim",), tags=_FULL, role="norm"),
}
"""Attention of tagged layers whose output is multiplied by the sigmoid of a gate."""

QWEN3_NEXT = Family(
    name="qwen3_next",
    model_types=("qwen3_next",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_key_value_heads", prunable=True, per_layer=True),
        Axis("head_dim", "head_dim", prunable=True),
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="kv_heads", per_layer=True),
        *delta_net.AXES,
        Axis("experts", "num_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "moe_intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("shared_ffn", "shared_expert_intermediate_size", prunable=True, per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        **GATED_ATTENTION,
        _LINEAR + "in_proj_qkvz.weight": Tensor((_QKVZ, "hidden"), tags=_DELTA),
        _LINEAR + "in_proj_ba.weight": Tensor((f"{KEY_HEADS}*({GROUP} + {GROUP})", "hidden"), tags=_DELTA),
        **delta_net.tensors(_LINEAR, _DELTA),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.gate_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.up_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.down_proj.weight": Tensor(("hidden", "ffn"), tags=_DENSE),
        **ROUTED,
        **{name: tensor for name, tensor in QWEN2_MOE.tensors.items() if ".shared_expert" in name},
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_ATTENTION + "o_proj", "input", _OUT, tags=_FULL),),
        "mixer": (Tap(_LINEAR + "out_proj", "input", VALUES, tags=_DELTA),),
        "nested": (Tap(_LINEAR + "in_proj_qkvz", "output", _QKVZ, tags=_DELTA, part=2),),
        **{kind: QWEN2_MOE.taps[kind] for kind in ("ffn", "experts", "shared_ffn", "mlp", "block", "head")},
    },
    defaults={
        **delta_net.DEFAULTS,
        "num_key_value_heads": 2,
        "intermediate_size": 5632,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
    },
    layer_rules=(delta_net.LAYER_TYPES, SPARSE),
    required={"full_attention": "DynamicCache.get_seq_length: can only be called on Attention layers"},
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        delta_net.DIVIDES,
        *GROUPED,
    ),
    norm=Norm(offset=1.0),
    rotary=Rotary(fraction=0.25, fraction_key="partial_rotary_factor"),
    nested=delta_net.NESTED,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    dropped={r"mtp\..+": "multi-token-prediction layers: the stock class does not load them"},
    cache={"full_attention": "kv_heads*(head_dim + v_head_dim)"},
    state={"linear_attention": delta_net.STATE},
    scan=delta_net.SCAN,
)
