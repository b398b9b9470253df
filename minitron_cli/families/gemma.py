"""Gemma: Llama's tensors; norm weights act as 1 + w, embeddings are scaled by sqrt(hidden)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, without

GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    tensors=without(LLAMA.tensors, "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False},
    divides=LLAMA.divides[:1],
    norm=Norm(offset=1.0),
    embed_scale="hidden",
)
