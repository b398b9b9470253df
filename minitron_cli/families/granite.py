"""Granite: Llama's tensors; embeddings, residuals, logits and the softmax are scaled by numbers of the config."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import unscaled

GRANITE = replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    # GraniteAttention: self.scaling = config.attention_multiplier, whatever head_dim is.
    tensors=unscaled(LLAMA.tensors),
    divides=LLAMA.divides[:1],
    residual_key="residual_multiplier",
)
