"""Mistral: Llama's tensors without biases; hidden need not be a multiple of heads (Mistral-NeMo: 5120 and 32 x 128)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    tensors={name: tensor for name, tensor in LLAMA.tensors.items() if not name.endswith(".bias")},
    defaults={"tie_word_embeddings": False, "num_key_value_heads": 8},
    divides=LLAMA.divides[:1],
)
