"""GLM-4: fused gate and up, four norms per layer, half of each head rotated, interleaved."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Rotary, Tensor, without

_LAYER = "model.layers.{layer}."

GLM4 = replace(
    LLAMA,
    name="glm4",
    model_types=("glm4",),
    tensors={
        **without(LLAMA.tensors, "gate_proj", "up_proj", "down_proj.bias", "o_proj.bias"),
        _LAYER + "post_self_attn_layernorm.weight": Tensor(("hidden",), role="norm"),
        # Glm4MLP: gate, up_states = up_states.chunk(2, dim=-1)
        _LAYER + "mlp.gate_up_proj.weight": Tensor(("2*ffn", "hidden")),
        _LAYER + "post_mlp_layernorm.weight": Tensor(("hidden",), role="norm"),
    },
    defaults={"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 2, "head_dim": 128},
    divides=LLAMA.divides[:1],
    readers={},
    post_norms=True,
    norm=Norm(eps=1.5625e-7),
    rotary=Rotary(layout="interleaved", fraction=0.5, fraction_key="partial_rotary_factor"),
)
