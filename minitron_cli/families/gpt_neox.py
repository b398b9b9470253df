"""GPT-NeoX and Pythia: parallel residual, LayerNorm, partly rotated heads, query/key/value interleaved per head."""

from __future__ import annotations

from minitron_cli.families.schema import Axis, Divides, Family, Norm, Rotary, Tap, Tensor

_LAYER = "gpt_neox.layers.{layer}."
_QKV = "heads*(head_dim + head_dim + v_head_dim)"

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True, per_layer=True),
        # One KV head per query head: they leave together.
        Axis("kv_heads", default="heads", prunable=True),
        Axis("head_dim", default="hidden // heads", prunable=True),
        Axis("v_head_dim", default="head_dim", within="heads", per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
    ),
    tensors={
        "gpt_neox.embed_in.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "attention.query_key_value.weight": Tensor((_QKV, "hidden"), role="query"),
        _LAYER + "attention.query_key_value.bias": Tensor((_QKV,), conditions=("attention_bias",), role="query"),
        _LAYER + "attention.dense.weight": Tensor(("hidden", "heads*v_head_dim")),
        _LAYER + "attention.dense.bias": Tensor(("hidden",), conditions=("attention_bias",)),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "post_attention_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "mlp.dense_h_to_4h.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.dense_h_to_4h.bias": Tensor(("ffn",)),
        _LAYER + "mlp.dense_4h_to_h.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.dense_4h_to_h.bias": Tensor(("hidden",)),
        "gpt_neox.final_layer_norm.weight": Tensor(("hidden",), role="norm"),
        "gpt_neox.final_layer_norm.bias": Tensor(("hidden",)),
        # In memory this is lm_head.weight.
        "embed_out.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_LAYER + "attention.dense", "input", "heads*v_head_dim"),),
        "ffn": (Tap(_LAYER + "mlp.dense_4h_to_h", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "qkv": (Tap(_LAYER + "attention.query_key_value", "output", _QKV),),
        "block": (Tap("gpt_neox.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={"tie_word_embeddings": False, "attention_bias": True},
    divides=(
        Divides("hidden", "heads", "GPTNeoXConfig.validate_architecture: hidden_size % num_attention_heads != 0"),
    ),
    # GPTNeoXAttention.__init__: head_size = hidden_size // num_attention_heads, and 3 * hidden_size fused rows.
    coupled={"hidden": "heads*head_dim"},
    norm=Norm("layer", "layer_norm_eps", eps=1e-5),
    rotary=Rotary(theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct"),
    tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
