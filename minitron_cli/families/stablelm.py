"""StableLM: LayerNorm, gated MLP, a quarter of each head rotated, optional parallel residual."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Axis, Norm, Rotary, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_SERIAL = ("!use_parallel_residual",)

STABLELM = replace(
    LLAMA,
    name="stablelm",
    model_types=("stablelm",),
    # StableLmLayerNormPerHead stores one tensor per head (norms.{head}.weight), which no table explains yet.
    when=("!qk_layernorm",),
    # StableLmAttention: self.head_dim = self.hidden_size // self.num_heads
    axes=LLAMA.axes_with(Axis("head_dim", default="hidden // heads", prunable=True)),
    tensors={
        **{
            name: replace(tensor, conditions=("use_qkv_bias",)) if name.endswith("_proj.bias") else tensor
            for name, tensor in without(
                LLAMA.tensors, "o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"
            ).items()
        },
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), conditions=_SERIAL, role="norm"),
        _LAYER + "post_attention_layernorm.bias": Tensor(("hidden",), conditions=_SERIAL),
        "model.norm.bias": Tensor(("hidden",)),
    },
    taps={
        **LLAMA.taps,
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden", conditions=_SERIAL),
        ),
    },
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "use_qkv_bias": False,
        "use_parallel_residual": False,
    },
    divides=LLAMA.divides[:1],
    # StableLmAttention.__init__: `hidden_size` must be divisible by num_heads; o_proj = nn.Linear(hidden, hidden).
    coupled={"hidden": "heads*head_dim"},
    readers={},
    norm=Norm("layer", "layer_norm_eps", eps=1e-5),
    rotary=Rotary(fraction=0.25, fraction_key="partial_rotary_factor"),
)
