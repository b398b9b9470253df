"""Qwen3-Next: gated attention every few layers, gated delta rule (linear attention) between, experts in most layers."""

from __future__ import annotations

from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_ATTENTION, _LINEAR = _LAYER + "self_attn.", _LAYER + "linear_attn."
_EXPERT, _SHARED = _LAYER + "mlp.experts.{expert}.", _LAYER + "mlp.shared_expert."
_FULL, _DELTA, _DENSE, _MOE = ("full_attention",), ("linear_attention",), ("dense",), ("moe",)
_BIAS = ("attention_bias",)
_QUERY_GATE = "kv_heads*group*(head_dim + v_head_dim)"  # each query head, then its output gate
_KEY, _VALUE, _OUT = "kv_heads*head_dim", "kv_heads*v_head_dim", "kv_heads*group*v_head_dim"
_VALUE_HEADS = "linear_key_heads*linear_group"
_VALUES = _VALUE_HEADS + "*linear_value_dim"
_QKVZ = (
    "linear_key_heads*(linear_key_dim + linear_key_dim + linear_group*linear_value_dim + linear_group*linear_value_dim)"
)
_CONV = f"linear_key_heads*linear_key_dim + linear_key_heads*linear_key_dim + {_VALUES}"
_SPARSE = LayerRule("decoder_sparse_step", "period", {"in": "moe", "out": "dense"})

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
        Axis("linear_key_heads", "linear_num_key_heads", prunable=True, per_layer=True),
        Axis("linear_value_heads", "linear_num_value_heads", prunable=True),
        # repeat_interleave gives each key head its own run of value heads.
        Axis(
            "linear_group", default="linear_value_heads // linear_key_heads", within="linear_key_heads", per_layer=True
        ),
        Axis("linear_key_dim", "linear_key_head_dim", prunable=True, within="linear_key_heads", per_layer=True),
        # One norm weight serves the channels of all value heads.
        Axis("linear_value_dim", "linear_value_head_dim", prunable=True, per_layer=True),
        Axis("conv", "linear_conv_kernel_dim", why_not="its units are positions in time, not channels"),
        Axis("experts", "num_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "moe_intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("shared_ffn", "shared_expert_intermediate_size", prunable=True, per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
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
        _LINEAR + "in_proj_qkvz.weight": Tensor((_QKVZ, "hidden"), tags=_DELTA),
        _LINEAR + "in_proj_ba.weight": Tensor(
            ("linear_key_heads*(linear_group + linear_group)", "hidden"), tags=_DELTA
        ),
        _LINEAR + "conv1d.weight": Tensor((_CONV, "1", "conv"), tags=_DELTA),
        _LINEAR + "dt_bias": Tensor((_VALUE_HEADS,), tags=_DELTA),
        _LINEAR + "A_log": Tensor((_VALUE_HEADS,), tags=_DELTA),
        # Unlike the family's other norms this one applies w, not 1 + w.
        _LINEAR + "norm.weight": Tensor(("linear_value_dim",), tags=_DELTA, role="norm", norm=Norm()),
        _LINEAR + "out_proj.weight": Tensor(("hidden", _VALUES), tags=_DELTA),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.gate_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.up_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.down_proj.weight": Tensor(("hidden", "ffn"), tags=_DENSE),
        _LAYER + "mlp.gate.weight": Tensor(("experts", "hidden"), tags=_MOE),
        _EXPERT + "gate_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
        _EXPERT + "up_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
        _EXPERT + "down_proj.weight": Tensor(("hidden", "expert_ffn"), tags=_MOE),
        _SHARED + "gate_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "up_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "down_proj.weight": Tensor(("hidden", "shared_ffn"), tags=_MOE),
        _LAYER + "mlp.shared_expert_gate.weight": Tensor(("1", "hidden"), tags=_MOE),
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_ATTENTION + "o_proj", "input", _OUT, tags=_FULL),),
        "linear_attention": (Tap(_LINEAR + "out_proj", "input", _VALUES, tags=_DELTA),),
        "ffn": (Tap(_LAYER + "mlp.down_proj", "input", "ffn", tags=_DENSE),),
        "experts": (Tap(_LAYER + "mlp.experts", "input", "hidden", tags=_MOE),),
        "shared_ffn": (Tap(_SHARED + "down_proj", "input", "shared_ffn", tags=_MOE),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule("full_attention_interval", "period", {"in": "full_attention", "out": "linear_attention"}),
        ),
        LayerRule("mlp_only_layers", "indices", {"in": "dense", "out": _SPARSE}, absent=_SPARSE),
    ),
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        Divides("linear_value_heads", "linear_key_heads", "repeat_interleave(num_v_heads // num_k_heads)"),
    ),
    norm=Norm(offset=1.0),
    rotary=Rotary(fraction=0.25, fraction_key="partial_rotary_factor"),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    dropped={r"mtp\..+": "multi-token-prediction layers: the stock class does not load them"},
    cache={"full_attention": "kv_heads*(head_dim + v_head_dim)"},
    draft=True,
)
