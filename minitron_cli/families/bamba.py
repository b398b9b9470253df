"""Bamba: Mamba-2 in most layers, attention in some, a gated MLP in all."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families import mamba2
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_MIXER = _LAYER + "mamba."
_MAMBA, _ATTENTION = ("linear_attention",), ("full_attention",)
_ATTENTION_TENSORS = {
    name: replace(tensor, tags=_ATTENTION) for name, tensor in LLAMA.tensors.items() if ".self_attn." in name
}
_ATTENTION_TAPS = {
    kind: tuple(replace(tap, tags=_ATTENTION) for tap in LLAMA.taps[kind])
    for kind in ("attention", "query", "key", "value")
}


def mlp_tensors(mlp: str) -> dict[str, Tensor]:
    """Llama's MLP under another name."""
    return {name.replace("mlp.", mlp, 1): tensor for name, tensor in LLAMA.tensors.items() if ".mlp." in name}


BAMBA = Family(
    name="bamba",
    model_types=("bamba",),
    axes=(
        *LLAMA.axes,
        # mamba_expand is a whole number, and the class computes the inner size from it.
        Axis("mamba_expand", "mamba_expand", 2, follows="mamba_heads * mamba_head_dim // hidden"),
        *mamba2.axes(
            groups="mamba_n_groups",
            heads="mamba_n_heads",
            head_dim=Axis(
                "mamba_head_dim", "mamba_d_head", "mamba_expand * hidden // mamba_heads", prunable=True, per_layer=True
            ),
            state="mamba_d_state",
            conv="mamba_d_conv",
        ),
        Axis("mamba_inner", default="mamba_heads * mamba_head_dim"),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        **_ATTENTION_TENSORS,
        **mamba2.tensors(
            _MIXER,
            _MAMBA,
            norm=Norm(eps=1e-5, per="mamba_groups"),
            biases={"in_proj": "mamba_proj_bias", "conv1d": "mamba_conv_bias", "out_proj": "mamba_proj_bias"},
        ),
        _LAYER + "pre_ff_layernorm.weight": Tensor(("hidden",), role="norm"),
        **mlp_tensors("feed_forward."),
        "model.final_layernorm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "pre_ff_layernorm", "output", "hidden"),
        ),
        **_ATTENTION_TAPS,
        **mamba2.taps(_MIXER, _MAMBA),
        "ffn": (Tap(_LAYER + "feed_forward.down_proj", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "feed_forward", "input", "hidden"),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "mamba_chunk_size": 256,
        "num_key_value_heads": 8,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    layer_rules=(
        LayerRule(
            "attn_layer_indices",
            "indices",
            {"in": "full_attention", "out": "linear_attention"},
            absent="linear_attention",
        ),
    ),
    required={"full_attention": "DynamicCache.get_seq_length: can only be called on Attention layers"},
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        mamba2.DIVIDES,
        Divides(
            "mamba_inner",
            "hidden",
            "BambaConfig.validate_architecture: mamba_d_head * mamba_n_heads != mamba_expand * hidden_size; cut "
            "mamba_heads or mamba_head_dim with hidden",
        ),
    ),
    norm=Norm(eps=1e-5),
    # BambaConfig: kwargs["partial_rotary_factor"] = 0.5
    rotary=Rotary(fraction=0.5, fraction_key="partial_rotary_factor"),
    nested=mamba2.NESTED,
    unpadded={"mamba_proj_bias": mamba2.UNPADDED},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"model\.rotary_emb\.inv_freq",),
    cache={"full_attention": "kv_heads*(head_dim + v_head_dim)"},
    state={"linear_attention": mamba2.STATE},
    scan=(mamba2.SCAN, "mamba_chunk_size"),
)
