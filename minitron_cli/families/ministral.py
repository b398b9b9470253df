"""Ministral: Mistral with layer types (windows in some layers)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.mistral import MISTRAL
from minitron_cli.families.schema import LayerRule

MINISTRAL = replace(
    MISTRAL,
    name="ministral",
    model_types=("ministral",),
    defaults={**MISTRAL.defaults, "sliding_window": 4096},
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule(
                "sliding_window",
                "flag",
                {"in": "sliding_attention", "out": "full_attention"},
                absent="full_attention",
            ),
        ),
    ),
)
