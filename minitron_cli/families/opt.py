"""OPT: learned positions, LayerNorm before each sublayer, ungated MLP, biases everywhere."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.schema import Axis, Family, Norm, Tap, Tensor, without

_MODEL = "model.decoder."
_LAYER = _MODEL + "layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_KEYS, _VALUES = "heads*head_dim", "heads*v_head_dim"
_BIASED, _AFFINE = ("enable_bias",), ("layer_norm_elementwise_affine",)
_FINAL = ("layer_norm_elementwise_affine", "!_remove_final_layer_norm")

OPT = Family(
    name="opt",
    model_types=("opt",),
    when=("do_layer_norm_before", "word_embed_proj_dim==hidden_size"),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "ffn_dim", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True, per_layer=True),
        # One KV head per query head: they leave together.
        Axis("kv_heads", default="heads", prunable=True),
        # No rotation: every head may keep its own query and key channels, and its own value channels.
        Axis("head_dim", default="hidden // heads", prunable=True, within="heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="heads", per_layer=True),
        Axis("embedding", "word_embed_proj_dim", "hidden", why_not="equals hidden here"),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
        Axis("positions", "max_position_embeddings", why_not="its units are positions of the context, not channels"),
    ),
    tensors={
        _MODEL + "embed_tokens.weight": Tensor(("vocab", "hidden")),
        # OPTLearnedPositionalEmbedding: num_embeddings + self.offset, offset = 2
        _MODEL + "embed_positions.weight": Tensor(("positions + 2", "hidden")),
        _LAYER + "self_attn_layer_norm.weight": Tensor(("hidden",), conditions=_AFFINE, role="norm"),
        _LAYER + "self_attn_layer_norm.bias": Tensor(("hidden",), conditions=_AFFINE),
        _ATTENTION + "q_proj.weight": Tensor((_KEYS, "hidden"), role="query"),
        _ATTENTION + "q_proj.bias": Tensor((_KEYS,), conditions=_BIASED, role="query"),
        _ATTENTION + "k_proj.weight": Tensor((_KEYS, "hidden")),
        _ATTENTION + "k_proj.bias": Tensor((_KEYS,), conditions=_BIASED),
        _ATTENTION + "v_proj.weight": Tensor((_VALUES, "hidden")),
        _ATTENTION + "v_proj.bias": Tensor((_VALUES,), conditions=_BIASED),
        _ATTENTION + "out_proj.weight": Tensor(("hidden", _VALUES)),
        _ATTENTION + "out_proj.bias": Tensor(("hidden",), conditions=_BIASED),
        _LAYER + "fc1.weight": Tensor(("ffn", "hidden")),
        _LAYER + "fc1.bias": Tensor(("ffn",), conditions=_BIASED),
        _LAYER + "fc2.weight": Tensor(("hidden", "ffn")),
        _LAYER + "fc2.bias": Tensor(("hidden",), conditions=_BIASED),
        _LAYER + "final_layer_norm.weight": Tensor(("hidden",), conditions=_AFFINE, role="norm"),
        _LAYER + "final_layer_norm.bias": Tensor(("hidden",), conditions=_AFFINE),
        _MODEL + "final_layer_norm.weight": Tensor(("hidden",), conditions=_FINAL, role="norm"),
        _MODEL + "final_layer_norm.bias": Tensor(("hidden",), conditions=_FINAL),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "self_attn_layer_norm", "output", "hidden"),
            Tap(_LAYER + "final_layer_norm", "output", "hidden"),
        ),
        "attention": (Tap(_ATTENTION + "out_proj", "input", _VALUES),),
        "ffn": (Tap(_LAYER + "fc2", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "fc1", "input", "hidden"),),
        "query": (Tap(_ATTENTION + "q_proj", "output", _KEYS),),
        "key": (Tap(_ATTENTION + "k_proj", "output", _KEYS),),
        "value": (Tap(_ATTENTION + "v_proj", "output", _VALUES),),
        "block": (Tap(_MODEL + "layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "do_layer_norm_before": True,
        "max_position_embeddings": 2048,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
    },
    # OPTAttention.__init__: embed_dim must be divisible by num_heads; q_proj = nn.Linear(embed_dim, embed_dim)
    coupled={"hidden": "heads*head_dim", "embedding": "hidden"},
    # nn.LayerNorm's own epsilon: OPTDecoderLayer passes none.
    norm=Norm("layer", eps_key="", eps=1e-5),
    prefix="model.",
    tied={"lm_head.weight": _MODEL + "embed_tokens.weight"},
)

# opt-350m: norms after each sublayer, and embeddings of another width, projected in and out.
OPT_POST_NORM = replace(
    OPT,
    name="opt_post_norm",
    when=("!do_layer_norm_before",),
    axes=OPT.axes_with(
        Axis("embedding", "word_embed_proj_dim", "hidden", why_not="the width of the embeddings; cut hidden instead")
    ),
    tensors={
        **without(OPT.tensors, _MODEL + "final_layer_norm", "lm_head"),
        _MODEL + "embed_tokens.weight": Tensor(("vocab", "embedding")),
        _MODEL + "project_in.weight": Tensor(("hidden", "embedding")),
        _MODEL + "project_out.weight": Tensor(("embedding", "hidden")),
        "lm_head.weight": Tensor(("vocab", "embedding"), conditions=("!tie_word_embeddings",)),
    },
    taps={**OPT.taps, "head": (Tap("lm_head", "input", "embedding"),)},
    coupled={"hidden": "heads*head_dim"},
    post_norms=True,
)
