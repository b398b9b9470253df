"""Falcon: three fused layouts (grouped, multi-query, one KV head per query head), with rotation or ALiBi."""

from __future__ import annotations

from dataclasses import replace

from minitron_cli.families.schema import Axis, Divides, Family, Norm, Rotary, Tap, Tensor

_LAYER = "transformer.h.{layer}."
_ATTENTION = _LAYER + "self_attention."
_BIASED = ("bias",)
_SHARED, _PER_HEAD = "heads*head_dim + head_dim + v_head_dim", "heads*(head_dim + head_dim + head_dim)"
_GROUPED, _GROUPED_VALUES = "kv_heads*(group*head_dim + head_dim + v_head_dim)", "kv_heads*group*v_head_dim"


def _table(fused: str, values: str, norms: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        "transformer.word_embeddings.weight": Tensor(("vocab", "hidden")),
        **{_LAYER + name + ".weight": Tensor(("hidden",), role="norm") for name in norms},
        **{_LAYER + name + ".bias": Tensor(("hidden",)) for name in norms},
        _ATTENTION + "query_key_value.weight": Tensor((fused, "hidden"), role="query"),
        _ATTENTION + "query_key_value.bias": Tensor((fused,), conditions=_BIASED, role="query"),
        _ATTENTION + "dense.weight": Tensor(("hidden", values)),
        _ATTENTION + "dense.bias": Tensor(("hidden",), conditions=_BIASED),
        _LAYER + "mlp.dense_h_to_4h.weight": Tensor(("ffn", "hidden")),
        _LAYER + "mlp.dense_h_to_4h.bias": Tensor(("ffn",), conditions=_BIASED),
        _LAYER + "mlp.dense_4h_to_h.weight": Tensor(("hidden", "ffn")),
        _LAYER + "mlp.dense_4h_to_h.bias": Tensor(("hidden",), conditions=_BIASED),
        "transformer.ln_f.weight": Tensor(("hidden",), role="norm"),
        "transformer.ln_f.bias": Tensor(("hidden",)),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    }


def _taps(fused: str, values: str, norms: tuple[str, ...]) -> dict[str, tuple[Tap, ...]]:
    return {
        "hidden": tuple(Tap(_LAYER + name, "output", "hidden") for name in norms),
        "attention": (Tap(_ATTENTION + "dense", "input", values),),
        "ffn": (Tap(_LAYER + "mlp.dense_4h_to_h", "input", "ffn"),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "qkv": (Tap(_ATTENTION + "query_key_value", "output", fused),),
        "block": (Tap("transformer.h.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    }


_LAYERS = Axis("layers", "num_hidden_layers", prunable=True)
_HIDDEN = Axis("hidden", "hidden_size", prunable=True)
_FFN = Axis("ffn", "ffn_hidden_size", "4 * hidden", prunable=True, per_layer=True)
_HEAD_DIM = Axis("head_dim", default="hidden // heads", prunable=True)
_VOCAB = Axis("vocab", "vocab_size", why_not="the tokenizer decides it")

FALCON_GROUPED = Family(
    name="falcon_grouped",
    model_types=("falcon",),
    when=("new_decoder_architecture", "parallel_attn", "!alibi", "num_ln_in_parallel_attn!=1"),
    axes=(
        _LAYERS,
        _HIDDEN,
        _FFN,
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_kv_heads", "heads", prunable=True, per_layer=True),
        _HEAD_DIM,
        _VOCAB,
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="kv_heads", per_layer=True),
    ),
    # FalconAttention._split_heads: view(batch, seq_len, -1, num_heads // num_kv_heads + 2, head_dim)
    tensors=_table(_GROUPED, _GROUPED_VALUES, ("ln_attn", "ln_mlp")),
    taps=_taps(_GROUPED, _GROUPED_VALUES, ("ln_attn", "ln_mlp")),
    defaults={
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "tie_word_embeddings": True,
    },
    divides=(Divides("heads", "kv_heads", "FalconAttention._split_heads: num_heads // num_kv_heads + 2"),),
    # FalconAttention.__init__: head_dim = hidden_size // num_heads; dense = FalconLinear(hidden_size, hidden_size)
    coupled={"hidden": "heads*head_dim"},
    norm=Norm("layer", "layer_norm_epsilon", eps=1e-5),
    rotary=Rotary(),
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.word_embeddings.weight"},
    ignored=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
    # FalconAttention._split_heads: key = torch.broadcast_to(key, query.shape), before the cache.
    cache={"": "kv_heads*group*(head_dim + v_head_dim)"},
)

# Falcon2-11B: one norm for both branches.
FALCON_GROUPED_ONE_NORM = replace(
    FALCON_GROUPED,
    name="falcon_grouped_one_norm",
    when=("new_decoder_architecture", "parallel_attn", "!alibi", "num_ln_in_parallel_attn=1"),
    tensors=_table(_GROUPED, _GROUPED_VALUES, ("input_layernorm",)),
    taps=_taps(_GROUPED, _GROUPED_VALUES, ("input_layernorm",)),
)

FALCON_MULTI_QUERY = replace(
    FALCON_GROUPED,
    name="falcon_multi_query",
    when=("!new_decoder_architecture", "multi_query", "parallel_attn", "!alibi"),
    axes=(
        _LAYERS,
        _HIDDEN,
        _FFN,
        Axis("heads", "num_attention_heads", prunable=True, per_layer=True),
        Axis(
            "kv_heads",
            default=1,
            why_not="FalconAttention: num_kv_heads = config.num_kv_heads if (self.new_decoder_architecture or "
            "not self.multi_query) else 1",
        ),
        _HEAD_DIM,
        _VOCAB,
        Axis("v_head_dim", default="head_dim", per_layer=True),
    ),
    # FalconAttention._split_heads: view(batch_size, seq_length, self.num_heads + 2, self.head_dim)
    tensors=_table(_SHARED, "heads*v_head_dim", ("input_layernorm",)),
    taps=_taps(_SHARED, "heads*v_head_dim", ("input_layernorm",)),
    divides=(),
    cache={"": "kv_heads*(head_dim + v_head_dim)"},
)

# build_alibi_tensor: slopes are powers of a base that depends on num_heads and on a head's place among them, and
# FalconAttention scales them by 1/sqrt(head_dim) with the scores; hidden is heads * head_dim.
_SLOPES = "build_alibi_tensor: closest_power_of_2 = 2 ** math.floor(math.log2(num_heads)); base = ... sets every slope"
_SCALED = "FalconAttention: attention_logits = attention_scores + alibi; attention_logits *= self.inv_norm_factor"
_SQUARE = "FalconAttention: head_dim = hidden_size // num_heads, and neither can be cut under ALiBi"

FALCON_ALIBI = replace(
    FALCON_GROUPED,
    name="falcon_alibi",
    when=("!new_decoder_architecture", "!multi_query", "!parallel_attn", "alibi"),
    axes=(
        _LAYERS,
        Axis("hidden", "hidden_size", why_not=_SQUARE),
        _FFN,
        Axis("heads", "num_attention_heads", why_not=_SLOPES),
        Axis("kv_heads", "num_kv_heads", "heads", why_not=_SLOPES),
        Axis("head_dim", default="hidden // heads", why_not=_SCALED),
        _VOCAB,
    ),
    # FalconAttention._split_heads: view(batch_size, seq_length, self.num_heads, 3, self.head_dim)
    tensors=_table(_PER_HEAD, "heads*head_dim", ("input_layernorm", "post_attention_layernorm")),
    taps=_taps(_PER_HEAD, "heads*head_dim", ("input_layernorm", "post_attention_layernorm")),
    divides=(),
    cache={"": "kv_heads*(head_dim + head_dim)"},
    attention="heads*(head_dim + head_dim)",
    rotary=None,
)
