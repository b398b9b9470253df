"""SmolLM3: Llama's tensors; some layers turn no positions (no_rope_layers, where 1 means that a layer does)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import LayerRule, Rotary


def _rope_rule(turning: str, still: str) -> LayerRule:
    return LayerRule(
        "no_rope_layers",
        "list",
        {1: turning, 0: still},
        absent=LayerRule("no_rope_layer_interval", "period", {"in": still, "out": turning}),
    )


_FULL = "full_attention"

SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_types=("smollm3",),
    defaults={
        **LLAMA.defaults,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
    layer_rules=(
        _rope_rule("rope", "no_rope"),
        # SmolLM3Config: layers without rotation slide, where windows are switched on and have a size.
        LayerRule(
            "layer_types",
            "list",
            absent=LayerRule(
                "use_sliding_window",
                "flag",
                {
                    "in": LayerRule(
                        "sliding_window",
                        "flag",
                        {"in": _rope_rule(_FULL, "sliding_attention"), "out": _FULL},
                        absent=_FULL,
                    ),
                    "out": _FULL,
                },
            ),
        ),
    ),
    divides=LLAMA.divides[:1],
    rotary=Rotary(theta_default=2000000.0),
)
