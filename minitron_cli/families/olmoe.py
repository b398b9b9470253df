"""OLMoE: OLMo 2's norms over all query and over all key channels, norms before each sublayer, experts."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.mixtral import GROUPED, MIXTRAL
from minitron_cli.families.olmo2 import OLMO2
from minitron_cli.families.qwen2_moe import ROUTED
from minitron_cli.families.schema import Axis, Norm, without

OLMOE = replace(
    LLAMA,
    name="olmoe",
    model_types=("olmoe",),
    when=("!clip_qkv",),
    axes=LLAMA.axes_with(
        Axis("experts", "num_experts", prunable=True, per_layer=True),
        Axis("expert_ffn", "intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("head_dim", default="hidden // heads", prunable=True),
        without="ffn",
    ),
    tensors={
        **without(OLMO2.tensors, "mlp.", "layernorm"),
        **{name: tensor for name, tensor in LLAMA.tensors.items() if "layernorm" in name},
        **{name: replace(tensor, tags=()) for name, tensor in ROUTED.items()},
    },
    taps={**{kind: taps for kind, taps in LLAMA.taps.items() if kind != "ffn"}, "experts": MIXTRAL.taps["experts"]},
    defaults={
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    divides=(*LLAMA.divides[:1], *GROUPED),
    # OlmoeAttention: q_norm = OlmoeRMSNorm(config.hidden_size), whose inputs are heads * head_dim channels.
    coupled={"hidden": "heads*head_dim"},
    norm=Norm(eps=1e-5),
    readers={},
)

OLMOE_CLIPPED = replace(
    OLMOE,
    name="olmoe_clipped",
    when=("clip_qkv",),
    axes=OLMOE.axes_with(
        Axis(
            "head_dim",
            default="hidden // heads",
            why_not="OlmoeAttention: query_states.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv) cuts off "
            "queries that carry the new softmax scale elsewhere than the old",
        )
    ),
)
