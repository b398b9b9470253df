"""Llama: gated MLP, grouped-query attention, RMSNorm, rotary positions, optional biases."""

from __future__ import annotations

from minitron_cli.families.schema import Axis, Divides, Family, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_QUERY, _KEY, _VALUE = "kv_heads*group*head_dim", "kv_heads*head_dim", "kv_heads*v_head_dim"

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_key_value_heads", "heads", prunable=True, per_layer=True),
        Axis("head_dim", "head_dim", "hidden // heads", prunable=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
        # Query heads are members of their KV head's group; each group chooses its own.
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        # Values are not rotated, so their channels are chosen freely, per KV head; the stock class has one head_dim.
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
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.gate_proj.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.up_proj.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.down_proj.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.gate_proj.bias": Tensor(("ffn",), conditions=("mlp_bias",)),
        _LAYER + "mlp.up_proj.bias": Tensor(("ffn",), conditions=("mlp_bias",)),
        _LAYER + "mlp.down_proj.bias": Tensor(("hidden",), conditions=("mlp_bias",)),
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
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
    defaults={"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    layer_rules=(),
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        Divides("hidden", "heads", "LlamaConfig.validate_architecture: hidden_size % num_attention_heads != 0"),
    ),
    rotary=Rotary(),
    prefix="model.",
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    readers={
        _LAYER + "input_layernorm.weight": tuple(_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        _LAYER + "post_attention_layernorm.weight": (
            _LAYER + "mlp.gate_proj.weight",
            _LAYER + "mlp.up_proj.weight",
        ),
        "model.norm.weight": ("lm_head.weight",),
    },
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
)
