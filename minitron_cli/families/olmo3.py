"""OLMo 3: OLMo 2 with windows in three of four layers and rope parameters per layer type."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.olmo2 import OLMO2
from minitron_cli.families.schema import LayerRule, Rotary

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    model_types=("olmo3",),
    layer_rules=(
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule("", "period", {"in": "full_attention", "out": "sliding_attention"}, fixed=4),
        ),
    ),
    # Olmo3Config pops a legacy rope_theta for full attention, and finds none left for windows.
    rotary=Rotary(sections={"full_attention": ("rope_theta", 500000.0), "sliding_attention": ("", 500000.0)}),
)
