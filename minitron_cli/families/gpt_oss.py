"""gpt-oss: every layer routes to experts stored as one stacked, transposed tensor with gate and up interleaved.

The table describes unpacked weights, as save_pretrained writes them; OpenAI's own files hold the experts packed in
MXFP4 (`gate_up_proj_blocks`, `gate_up_proj_scales`).
"""

from __future__ import annotations

from minitron_cli.families.mixtral import GROUPED
from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_QUERY, _KEY, _VALUE = "kv_heads*group*head_dim", "kv_heads*head_dim", "kv_heads*v_head_dim"

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("experts", "num_local_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_key_value_heads", "heads", prunable=True, per_layer=True),
        Axis("head_dim", "head_dim", "hidden // heads", prunable=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="kv_heads", per_layer=True),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "self_attn.q_proj.weight": Tensor((_QUERY, "hidden"), role="query"),
        _LAYER + "self_attn.k_proj.weight": Tensor((_KEY, "hidden")),
        _LAYER + "self_attn.v_proj.weight": Tensor((_VALUE, "hidden")),
        _LAYER + "self_attn.o_proj.weight": Tensor(("hidden", "kv_heads*group*v_head_dim")),
        _LAYER + "self_attn.q_proj.bias": Tensor((_QUERY,), conditions=("attention_bias",), role="query"),
        _LAYER + "self_attn.k_proj.bias": Tensor((_KEY,), conditions=("attention_bias",)),
        _LAYER + "self_attn.v_proj.bias": Tensor((_VALUE,), conditions=("attention_bias",)),
        _LAYER + "self_attn.o_proj.bias": Tensor(("hidden",), conditions=("attention_bias",)),
        # One learned logit per query head that takes part in its softmax.
        _LAYER + "self_attn.sinks": Tensor(("kv_heads*group",)),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.router.weight": Tensor(("experts", "hidden"), role="router"),
        _LAYER + "mlp.router.bias": Tensor(("experts",), role="router"),
        _LAYER + "mlp.experts.gate_up_proj": Tensor(("experts", "hidden", "expert_ffn*2")),
        _LAYER + "mlp.experts.gate_up_proj_bias": Tensor(("experts", "expert_ffn*2")),
        _LAYER + "mlp.experts.down_proj": Tensor(("experts", "expert_ffn", "hidden")),
        _LAYER + "mlp.experts.down_proj_bias": Tensor(("experts", "hidden")),
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_LAYER + "self_attn.o_proj", "input", "kv_heads*group*v_head_dim"),),
        "experts": (Tap(_LAYER + "mlp.experts", "input", "hidden"),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "query": (Tap(_LAYER + "self_attn.q_proj", "output", _QUERY),),
        "key": (Tap(_LAYER + "self_attn.k_proj", "output", _KEY),),
        "value": (Tap(_LAYER + "self_attn.v_proj", "output", _VALUE),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule("", "period", {"in": "full_attention", "out": "sliding_attention"}, fixed=2),
        ),
    ),
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        *GROUPED,
    ),
    norm=Norm(eps=1e-5),
    # Published models use yarn, as does a config that names no type; its ramp depends on the size.
    rotary=Rotary(theta_default=150000.0, type_default="yarn"),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
)
