"""Mixtral: Mistral's attention; every MLP is a router and experts (gate w1, up w3, down w2)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.mistral import MISTRAL
from minitron_cli.families.schema import Axis, Divides, Norm, Rotary, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."

GROUPED = tuple(
    Divides(axis, "8", "grouped_mm, which runs experts: strides should be multiple of 16 bytes, 8 values of 16 bits")
    for axis in ("hidden", "expert_ffn")
)
"""Sizes that the stock classes can run experts of."""

MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    model_types=("mixtral",),
    axes=MISTRAL.axes_with(
        Axis("experts", "num_local_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "intermediate_size", prunable=True, within="experts", per_layer=True),
        without="ffn",
    ),
    tensors={
        **without(MISTRAL.tensors, "mlp."),
        _LAYER + "block_sparse_moe.gate.weight": Tensor(("experts", "hidden"), role="router"),
        _EXPERT + "w1.weight": Tensor(("expert_ffn", "hidden")),
        _EXPERT + "w2.weight": Tensor(("hidden", "expert_ffn")),
        _EXPERT + "w3.weight": Tensor(("expert_ffn", "hidden")),
    },
    taps={
        **{kind: taps for kind, taps in MISTRAL.taps.items() if kind != "ffn"},
        "experts": (Tap(_LAYER + "mlp.experts", "input", "hidden"),),
    },
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    divides=(*MISTRAL.divides, *GROUPED),
    norm=Norm(eps=1e-5),
    rotary=Rotary(theta_default=1000000.0),
    readers={},
)
