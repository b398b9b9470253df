"""GPT-2: learned positions, LayerNorm, fused attention, and transposed linears (Conv1D stores input x output)."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.schema import Axis, Family, Norm, Tap, Tensor

_LAYER = "transformer.h.{layer}."
_QKV = "heads*head_dim + heads*head_dim + heads*v_head_dim"
_SCALED = ("scale_attn_weights",)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    when=("!scale_attn_by_inverse_layer_idx", "!add_cross_attention"),
    axes=(
        Axis("layers", "n_layer", prunable=True),
        Axis("hidden", "n_embd", prunable=True),
        Axis("ffn", "n_inner", "4 * hidden", prunable=True, per_layer=True),
        Axis("heads", "n_head", prunable=True, per_layer=True),
        # One KV head per query head: they leave together.
        Axis("kv_heads", default="heads", prunable=True),
        # No rotation: every head may keep its own query and key channels, and its own value channels.
        Axis("head_dim", default="hidden // heads", prunable=True, within="heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="heads", per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
        Axis("positions", "n_positions", why_not="its units are positions of the context, not channels"),
    ),
    tensors={
        "transformer.wte.weight": Tensor(("vocab", "hidden")),
        "transformer.wpe.weight": Tensor(("positions", "hidden")),
        _LAYER + "ln_1.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "ln_1.bias": Tensor(("hidden",)),
        _LAYER + "attn.c_attn.weight": Tensor(
            ("hidden", _QKV), conditions=_SCALED, role="query", otherwise=Tensor(("hidden", _QKV))
        ),
        _LAYER + "attn.c_attn.bias": Tensor((_QKV,), conditions=_SCALED, role="query", otherwise=Tensor((_QKV,))),
        _LAYER + "attn.c_proj.weight": Tensor(("heads*v_head_dim", "hidden")),
        _LAYER + "attn.c_proj.bias": Tensor(("hidden",)),
        _LAYER + "ln_2.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "ln_2.bias": Tensor(("hidden",)),
        _LAYER + "mlp.c_fc.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.c_fc.bias": Tensor(("ffn",)),
        _LAYER + "mlp.c_proj.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.c_proj.bias": Tensor(("hidden",)),
        "transformer.ln_f.weight": Tensor(("hidden",), role="norm"),
        "transformer.ln_f.bias": Tensor(("hidden",)),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (Tap(_LAYER + "ln_1", "output", "hidden"), Tap(_LAYER + "ln_2", "output", "hidden")),
        "attention": (Tap(_LAYER + "attn.c_proj", "input", "heads*v_head_dim"),),
        "ffn": (Tap(_LAYER + "mlp.c_proj", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "qkv": (Tap(_LAYER + "attn.c_attn", "output", _QKV),),
        "block": (Tap("transformer.h.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={"n_positions": 1024, "tie_word_embeddings": True, "scale_attn_weights": True},
    # GPT2Attention.__init__: head_dim = embed_dim // num_heads, and c_attn = Conv1D(3 * embed_dim, embed_dim).
    coupled={"hidden": "heads*head_dim"},
    norm=Norm("layer", "layer_norm_epsilon", eps=1e-5),
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)

GPT2_BY_LAYER = replace(
    GPT2,
    name="gpt2_by_layer",
    when=("scale_attn_by_inverse_layer_idx", "!add_cross_attention"),
    axes=GPT2.axes_with(
        Axis("layers", "n_layer", why_not="GPT2Attention: self.scaling /= float(self.layer_idx + 1) would change")
    ),
)
