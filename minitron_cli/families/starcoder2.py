"""StarCoder2: LayerNorm, ungated MLP, biases everywhere, grouped-query attention."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.llama import LLAMA
from minitron_cli.families.schema import Norm, Tap, Tensor, without

_LAYER = "model.layers.{layer}."
_BIASED = ("use_bias",)

STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    model_types=("starcoder2",),
    tensors={
        **{
            name: replace(tensor, conditions=_BIASED) if name.endswith("_proj.bias") else tensor
            for name, tensor in without(LLAMA.tensors, ".mlp.").items()
        },
        _LAYER + "input_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "post_attention_layernorm.bias": Tensor(("hidden",)),
        _LAYER + "mlp.c_fc.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.c_fc.bias": Tensor(("ffn",), conditions=_BIASED),
        _LAYER + "mlp.c_proj.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.c_proj.bias": Tensor(("hidden",), conditions=_BIASED),
        "model.norm.bias": Tensor(("hidden",)),
    },
    taps={**LLAMA.taps, "ffn": (Tap(_LAYER + "mlp.c_proj", "input", "ffn"),)},
    defaults={"tie_word_embeddings": True, "num_key_value_heads": 2, "use_bias": True},
    divides=LLAMA.divides[:1],
    readers={},
    norm=Norm("layer", "norm_epsilon", eps=1e-5),
)
