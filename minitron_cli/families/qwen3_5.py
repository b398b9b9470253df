"""The text models of Qwen3.5: Qwen3-Next's layers with projections of their own, a dense MLP or experts in all."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families import delta_net
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.qwen2_moe import QWEN2_MOE
from minitron_cli.families.qwen3_next import QWEN3_NEXT
from minitron_cli.families.schema import Tap, Tensor, without

_LINEAR = "model.layers.{layer}.linear_attn."
_EXPERTS = "model.layers.{layer}.mlp.experts."
_DELTA = ("linear_attention",)
_MIXERS: dict[str, Tensor] = {
    **without(QWEN3_NEXT.tensors, ".mlp.", "in_proj_"),
    _LINEAR + "in_proj_qkv.weight": Tensor((delta_net.CONV, "hidden"), tags=_DELTA),
    _LINEAR + "in_proj_z.weight": Tensor((delta_net.VALUES, "hidden"), tags=_DELTA),
    _LINEAR + "in_proj_b.weight": Tensor((delta_net.VALUE_HEADS, "hidden"), tags=_DELTA),
    _LINEAR + "in_proj_a.weight": Tensor((delta_net.VALUE_HEADS, "hidden"), tags=_DELTA),
}
_NESTED = (Tap(_LINEAR + "in_proj_qkv", "output", delta_net.CONV, tags=_DELTA, part=2),)
_ROUTED = ("experts", "expert_ffn", "shared_ffn")

QWEN3_5 = replace(
    QWEN3_NEXT,
    name="qwen3_5_text",
    model_types=("qwen3_5_text",),
    axes=tuple(axis for axis in QWEN3_NEXT.axes if axis.name not in _ROUTED),
    tensors={
        **_MIXERS,
        **{name: tensor for name, tensor in LLAMA.tensors.items() if ".mlp." in name and not name.endswith(".bias")},
    },
    taps={
        **{kind: taps for kind, taps in QWEN3_NEXT.taps.items() if kind not in _ROUTED},
        "ffn": LLAMA.taps["ffn"],
        "nested": _NESTED,
    },
    defaults={**delta_net.DEFAULTS, "num_key_value_heads": 4},
    layer_rules=(delta_net.LAYER_TYPES,),
    divides=QWEN3_NEXT.divides[:2],
    dropped_config={"mtp_num_hidden_layers": 0},
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe_text",
    model_types=("qwen3_5_moe_text",),
    axes=tuple(axis for axis in QWEN3_NEXT.axes if axis.name != "ffn"),
    tensors={
        **_MIXERS,
        **{
            name: replace(tensor, tags=())
            for name, tensor in QWEN2_MOE.tensors.items()
            if ".mlp." in name and "dense" not in tensor.tags
        },
    },
    taps={
        **{kind: taps for kind, taps in QWEN3_5.taps.items() if kind != "ffn"},
        **{kind: tuple(replace(tap, tags=()) for tap in QWEN2_MOE.taps[kind]) for kind in ("experts", "shared_ffn")},
    },
    defaults={
        **delta_net.DEFAULTS,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    divides=QWEN3_NEXT.divides,
    # As they were published; save_pretrained takes them apart.
    stacked={
        _EXPERTS + "gate_up_proj": Tensor(("experts", "2*expert_ffn", "hidden")),
        _EXPERTS + "down_proj": Tensor(("experts", "hidden", "expert_ffn")),
    },
)
