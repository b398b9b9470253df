"""Phi-3.5-MoE: Mixtral's experts, LayerNorms, and two experts per token, mixed by SparseMixer."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.mixtral import MIXTRAL
from minitron_cli.families.schema import Least, Norm, Rotary, Tensor

_LAYER = "model.layers.{layer}."
_ATTENTION_BIASES = {name: tensor for name, tensor in LLAMA.tensors.items() if "self_attn" in name and "bias" in name}

PHIMOE = replace(
    MIXTRAL,
    name="phimoe",
    model_types=("phimoe",),
    tensors={
        **MIXTRAL.tensors,
        **_ATTENTION_BIASES,
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "post_attention_layernorm.bias": Tensor(("hidden",)),
        "model.norm.bias": Tensor(("hidden",)),
        "lm_head.bias": Tensor(("vocab",), conditions=("lm_head_bias",)),
    },
    defaults={
        **MIXTRAL.defaults,
        "num_local_experts": 16,
        "attention_bias": False,
        "lm_head_bias": False,
    },
    # sparsemixer picks the first and the second whatever num_experts_per_tok says.
    chosen_key=2,
    least=(Least("experts", "2", "sparsemixer: masked_scores without the first expert, then max"),),
    norm=Norm("layer", "rms_norm_eps", eps=1e-5),
    # Published models use longrope, whose factors are one per frequency.
    rotary=Rotary(theta_default=1000000.0, types=("default",)),
)
