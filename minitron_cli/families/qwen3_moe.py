"""Qwen3-MoE: Qwen3's attention; experts, with dense MLPs in some layers."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.qwen2_moe import QWEN2_MOE, ROUTED, SPARSE
from minitron_cli.families.qwen3 import QWEN3
from minitron_cli.families.schema import LayerRule, without

_WINDOW = LayerRule("sliding_window", "flag", {"in": "sliding_attention"}, absent="")

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    axes=tuple(axis for axis in QWEN2_MOE.axes if axis.name != "shared_ffn"),
    tensors={
        **without(QWEN3.tensors, "mlp."),
        **{name: replace(tensor, tags=("dense",)) for name, tensor in QWEN3.tensors.items() if "mlp." in name},
        **ROUTED,
    },
    taps={**QWEN3.taps, "ffn": QWEN2_MOE.taps["ffn"], "experts": QWEN2_MOE.taps["experts"]},
    defaults={
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    spellings={"num_local_experts": "num_experts"},
    layer_rules=(LayerRule("use_sliding_window", "flag", {"in": _WINDOW}), SPARSE),
    divides=QWEN2_MOE.divides,
    readers={},
)
