"""OLMo: Llama's tensors and norms without any weights."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Axis, Norm, without

OLMO = replace(
    LLAMA,
    name="olmo",
    model_types=("olmo",),
    when=("!clip_qkv",),
    tensors=without(LLAMA.tensors, "norm", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
    defaults={"tie_word_embeddings": False, "attention_bias": False},
    divides=LLAMA.divides[:1],
    # OlmoLayerNorm: F.layer_norm(..., None, None, eps=1e-5)
    readers={},
    norm=Norm("layer", eps_key="", eps=1e-5),
)

OLMO_CLIPPED = replace(
    OLMO,
    name="olmo_clipped",
    when=("clip_qkv",),
    axes=OLMO.axes_with(
        Axis(
            "head_dim",
            "head_dim",
            "hidden // heads",
            why_not="OlmoAttention: query_states.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv) cuts off "
            "queries that carry the new softmax scale elsewhere than the old",
        )
    ),
)
