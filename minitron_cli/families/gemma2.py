"""Gemma 2: norms before and after each sublayer (weights act as 1 + w), scaled embeddings, soft-capped logits."""

from __future__ import annotations

from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
# The softmax scale is query_pre_attn_scalar**-0.5, whatever head_dim is, so no tensor has the role "query".
_QUERY, _KEY, _VALUE = "kv_heads*group*head_dim", "kv_heads*head_dim", "kv_heads*v_head_dim"

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_key_value_heads", prunable=True, per_layer=True),
        Axis("head_dim", "head_dim", prunable=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="kv_heads", per_layer=True),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "self_attn.q_proj.weight": Tensor((_QUERY, "hidden")),
        _LAYER + "self_attn.k_proj.weight": Tensor((_KEY, "hidden")),
        _LAYER + "self_attn.v_proj.weight": Tensor((_VALUE, "hidden")),
        _LAYER + "self_attn.o_proj.weight": Tensor(("hidden", "kv_heads*group*v_head_dim")),
        _LAYER + "self_attn.q_proj.bias": Tensor((_QUERY,), conditions=("attention_bias",)),
        _LAYER + "self_attn.k_proj.bias": Tensor((_KEY,), conditions=("attention_bias",)),
        _LAYER + "self_attn.v_proj.bias": Tensor((_VALUE,), conditions=("attention_bias",)),
        _LAYER + "self_attn.o_proj.bias": Tensor(("hidden",), conditions=("attention_bias",)),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "pre_feedforward_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.gate_proj.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.up_proj.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.down_proj.weight": Tensor(("hidden", "ffn")),
        _LAYER + "post_feedforward_layernorm.weight": Tensor(("hidden",), role="norm"),
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "pre_feedforward_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_LAYER + "self_attn.o_proj", "input", "kv_heads*group*v_head_dim"),),
        "ffn": (Tap(_LAYER + "mlp.down_proj", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "query": (Tap(_LAYER + "self_attn.q_proj", "output", _QUERY),),
        "key": (Tap(_LAYER + "self_attn.k_proj", "output", _KEY),),
        "value": (Tap(_LAYER + "self_attn.v_proj", "output", _VALUE),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False},
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule("", "period", {"in": "full_attention", "out": "sliding_attention"}, fixed=2),
        ),
    ),
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        Divides("hidden", "heads", "Gemma2Config.validate_architecture: hidden_size % num_attention_heads != 0"),
    ),
    norm=Norm(offset=1.0),
    rotary=Rotary(),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    post_norms=True,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    embed_scale="hidden",
    softcap_key="final_logit_softcapping",
)
