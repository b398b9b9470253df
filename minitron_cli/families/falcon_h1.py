"""Falcon-H1: Mamba-2 and attention side by side in every layer, a gated MLP behind them, fixed multipliers all over.

The multipliers scale whole sections (keys, gate, x, B, C, time steps, outputs), so that no cut touches them.
"""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families import mamba2
from minitron_cli.families.bamba import BAMBA, mlp_tensors
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Axis, Divides, Norm, Rotary, Tensor

_LAYER = "model.layers.{layer}."
_MIXER = _LAYER + "mamba."

FALCON_H1 = replace(
    BAMBA,
    name="falcon_h1",
    model_types=("falcon_h1",),
    axes=(
        *LLAMA.axes,
        Axis("mamba_expand", "mamba_expand", 2),
        # A null mamba_d_ssm means mamba_expand * hidden.
        Axis("mamba_inner", "mamba_d_ssm", "mamba_expand * hidden", follows="mamba_heads * mamba_head_dim"),
        *mamba2.axes(
            groups="mamba_n_groups",
            heads="mamba_n_heads",
            head_dim=Axis(
                "mamba_head_dim", "mamba_d_head", "mamba_inner // mamba_heads", prunable=True, per_layer=True
            ),
            state="mamba_d_state",
            conv="mamba_d_conv",
        ),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        **{name: tensor for name, tensor in LLAMA.tensors.items() if ".self_attn." in name},
        **mamba2.tensors(
            _MIXER,
            (),
            norm=Norm(eps=1e-5, per="mamba_groups"),
            norm_if=("mamba_rms_norm",),
            biases={"in_proj": "mamba_proj_bias", "conv1d": "mamba_conv_bias", "out_proj": "projectors_bias"},
        ),
        _LAYER + "pre_ff_layernorm.weight": Tensor(("hidden",), role="norm"),
        **mlp_tensors("feed_forward."),
        "model.final_layernorm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={kind: tuple(replace(tap, tags=()) for tap in taps) for kind, taps in BAMBA.taps.items()},
    defaults={**BAMBA.defaults, "mamba_d_ssm": 1024, "mamba_rms_norm": False, "projectors_bias": False},
    layer_rules=(),
    required={},
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        mamba2.DIVIDES,
    ),
    rotary=Rotary(),
    residual_key={
        "attention": "attention_out_multiplier",
        "mixer": "ssm_out_multiplier",
        "ffn": "mlp_multipliers.1",
    },
    cache={"": "kv_heads*(head_dim + v_head_dim)"},
    state={"": mamba2.STATE},
)
