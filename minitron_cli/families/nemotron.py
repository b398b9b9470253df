"""Nemotron (Nemotron-4, Minitron): LayerNorm whose weights act as 1 + w, ungated MLP, half of each head rotated."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Rotary, Tensor, without

_LAYER = "model.layers.{layer}."

NEMOTRON = replace(
    LLAMA,
    name="nemotron",
    model_types=("nemotron",),
    tensors={
        **without(LLAMA.tensors, "gate_proj"),
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "post_attention_layernorm.bias": Tensor(("hidden",)),
        "model.norm.bias": Tensor(("hidden",)),
    },
    divides=LLAMA.divides[:1],
    readers={},
    norm=Norm("layer", "norm_eps", offset=1.0, eps=1e-5),
    rotary=Rotary(fraction=0.5, fraction_key="partial_rotary_factor"),
)
