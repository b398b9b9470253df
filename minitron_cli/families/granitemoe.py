"""Granite MoE: Granite's attention; experts stacked on disk, gate and up concatenated (input_linear)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.granite import GRANITE
from minitron_cli.families.mixtral import GROUPED, MIXTRAL
from minitron_cli.families.schema import Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_MOE = _LAYER + "block_sparse_moe."

GRANITEMOE = replace(
    GRANITE,
    name="granitemoe",
    model_types=("granitemoe",),
    axes=MIXTRAL.axes,
    tensors={
        **without(GRANITE.tensors, "mlp."),
        _MOE + "router.layer.weight": Tensor(("experts", "hidden"), role="router"),
        # GraniteMoeExperts: gate, up = linear(...).chunk(2, dim=-1)
        _MOE + "input_linear.weight": Tensor(("experts", "2*expert_ffn", "hidden")),
        _MOE + "output_linear.weight": Tensor(("experts", "hidden", "expert_ffn")),
    },
    taps={
        **{kind: taps for kind, taps in GRANITE.taps.items() if kind != "ffn"},
        "experts": (Tap(_MOE + "experts", "input", "hidden"),),
        "mlp": (Tap(_LAYER + "block_sparse_moe", "input", "hidden"),),
    },
    defaults={
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    divides=(*GRANITE.divides, *GROUPED),
    readers={},
)
