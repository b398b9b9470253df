"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; experts beside a gated shared one, dense MLPs in some layers."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.mixtral import GROUPED
from minitron_cli.families.schema import Axis, LayerRule, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_EXPERT, _SHARED = _LAYER + "mlp.experts.{expert}.", _LAYER + "mlp.shared_expert."
_DENSE, _MOE = ("dense",), ("moe",)
_PERIOD = LayerRule("decoder_sparse_step", "period", {"in": "moe", "out": "dense"})

SPARSE = LayerRule("mlp_only_layers", "indices", {"in": "dense", "out": _PERIOD}, absent=_PERIOD)
"""Qwen2MoeDecoderLayer: layer_idx not in mlp_only_layers and (layer_idx + 1) % decoder_sparse_step == 0."""

ROUTED: dict[str, Tensor] = {
    _LAYER + "mlp.gate.weight": Tensor(("experts", "hidden"), role="router", tags=_MOE),
    _EXPERT + "gate_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
    _EXPERT + "up_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
    _EXPERT + "down_proj.weight": Tensor(("hidden", "expert_ffn"), tags=_MOE),
}
"""Router and experts of layers tagged "moe"."""

_WINDOW = LayerRule("max_window_layers", "leading", {"in": "sliding_attention", "out": "full_attention"})

QWEN2_MOE = replace(
    LLAMA,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    axes=LLAMA.axes_with(
        Axis("experts", "num_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "moe_intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("shared_ffn", "shared_expert_intermediate_size", prunable=True, per_layer=True),
    ),
    tensors={
        **{
            name: replace(tensor, conditions=("qkv_bias",)) if name.endswith(".bias") else tensor
            for name, tensor in without(LLAMA.tensors, "mlp.", "o_proj.bias").items()
        },
        **{
            name: replace(tensor, tags=_DENSE)
            for name, tensor in LLAMA.tensors.items()
            if "mlp." in name and not name.endswith(".bias")
        },
        **ROUTED,
        _SHARED + "gate_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "up_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "down_proj.weight": Tensor(("hidden", "shared_ffn"), tags=_MOE),
        _LAYER + "mlp.shared_expert_gate.weight": Tensor(("1", "hidden"), tags=_MOE),
    },
    taps={
        **LLAMA.taps,
        "ffn": (Tap(_LAYER + "mlp.down_proj", "input", "ffn", tags=_DENSE),),
        "experts": (Tap(_LAYER + "mlp.experts", "input", "hidden", tags=_MOE),),
        "shared_ffn": (Tap(_SHARED + "down_proj", "input", "shared_ffn", tags=_MOE),),
    },
    defaults={
        "intermediate_size": 5632,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
    },
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule(
                "use_sliding_window",
                "flag",
                {
                    "in": LayerRule("", "period", {"in": "full_attention", "out": _WINDOW}, fixed=2),
                    "out": "full_attention",
                },
            ),
        ),
        SPARSE,
    ),
    divides=(*LLAMA.divides[:1], *GROUPED),
    readers={},
)
