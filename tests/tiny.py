"""Tiny configs of every proven family: sizes chosen so that mixed-up axes cannot cancel.

No two axes have equal sizes; two query heads on each of three KV heads; heads * head_dim != hidden where the stock
class allows; windows shorter than the test sequences; layer types mixed. The name before the dash is the model type.
"""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = dict(
    vocab_size=67, hidden_size=48, intermediate_size=56, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Where the class computes head_dim = hidden / heads. A quarter of 24 channels is three rotary pairs: two can stay.
_SQUARE: dict[str, Any] = {**_BASE, "hidden_size": 96, "head_dim": None}
_QUARTER: dict[str, Any] = {**_SQUARE, "hidden_size": 144}
_MAMBA: dict[str, Any] = dict(
    n_groups=4, mamba_num_heads=16, mamba_head_dim=10, ssm_state_size=7, conv_kernel=4, chunk_size=8,
)  # fmt: skip
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _of(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    merged = {**base, **changes}
    return {key: value for key, value in merged.items() if not (key == "head_dim" and value is None)}


TINY: dict[str, dict[str, Any]] = {
    "nemotron_h": _of(
        _BASE, hidden_size=40, **_MAMBA, use_bias=True, mlp_bias=True, n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=34, norm_topk_prob=False,
        layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
    ),
    "nemotron_h-latent": _of(
        _BASE, hidden_size=44, **_MAMBA, use_conv_bias=False, moe_latent_size=40, mlp_bias=True,
        n_routed_experts=10, num_experts_per_tok=3, n_group=2, topk_group=1, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=34, routed_scaling_factor=2.5,
        layers_block_type=["moe", "linear_attention", "full_attention", "moe"],
    ),
    "bamba": _of(
        _BASE, mamba_n_groups=4, mamba_n_heads=16, mamba_d_head=6, mamba_d_state=7, mamba_chunk_size=8,
        attn_layer_indices=[2], mamba_proj_bias=True, attention_bias=True, mlp_bias=True,
    ),
    "falcon_h1": _of(
        _BASE, hidden_size=44, mamba_d_ssm=120, mamba_n_groups=4, mamba_n_heads=12, mamba_d_head=10, mamba_d_state=7,
        mamba_chunk_size=8, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_proj_bias=True, mlp_bias=True,
        projectors_bias=True, attention_bias=True, embedding_multiplier=3.0, lm_head_multiplier=0.5,
        key_multiplier=0.7, mlp_multipliers=[1.3, 0.8], attention_in_multiplier=1.2, attention_out_multiplier=0.9,
        ssm_in_multiplier=1.1, ssm_out_multiplier=0.6, ssm_multipliers=[0.5, 1.5, 0.8, 1.2, 0.9],
    ),
    "llama": _of(_BASE, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    "mistral": _of(_BASE, hidden_size=44, tie_word_embeddings=True, rms_norm_eps=1e-5, sliding_window=None),
    "ministral": _of(_BASE, hidden_size=44, sliding_window=8, layer_types=_MIXED),
    "qwen2": _of(_BASE, hidden_size=44, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": _of(_BASE, hidden_size=44, attention_bias=True, sliding_window=None, tie_word_embeddings=True),
    "olmo": _of(_BASE, hidden_size=44),
    "olmo-clipped": _of(_BASE, hidden_size=44, clip_qkv=2.0, attention_bias=True),
    "olmo2": _of(_BASE, hidden_size=44, attention_bias=True),
    "olmo3": _of(_BASE, hidden_size=44, sliding_window=8),
    "granite": _of(
        _BASE, hidden_size=44, attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, logits_scaling=2.0,
        residual_multiplier=0.7, attention_multiplier=0.3,
    ),
    "smollm3": _of(
        _BASE, hidden_size=44, mlp_bias=True, use_sliding_window=True, sliding_window=8, no_rope_layer_interval=3
    ),
    "gemma": _of(_BASE, hidden_size=44, tie_word_embeddings=True),
    "gemma2": _of(_BASE, tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=10),
    "gemma3_text": _of(
        _BASE, tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=10, sliding_window_pattern=3
    ),
    "phi3": _of(_BASE, hidden_size=44, partial_rotary_factor=0.75, sliding_window=8),
    "cohere": _of(_BASE, hidden_size=44, tie_word_embeddings=True, attention_bias=True),
    "cohere-qk_norm": _of(_BASE, hidden_size=44, use_qk_norm=True),
    "cohere2": _of(_SQUARE, tie_word_embeddings=True, sliding_window=8, sliding_window_pattern=2),
    "glm4": _of(_BASE, hidden_size=44),
    "exaone4": _of(_BASE, hidden_size=44, sliding_window=8, sliding_window_pattern=3),
    "nemotron": _of(_BASE, hidden_size=44, attention_bias=True, mlp_bias=True),
    "starcoder2": _of(_BASE, hidden_size=44, tie_word_embeddings=True),
    "stablelm": _of(_QUARTER, use_qkv_bias=True),
    "stablelm-parallel": _of(_QUARTER, use_parallel_residual=True),
    "phi": _of(_BASE, hidden_size=44),
    "phi-qk_norm": _of(_SQUARE, qk_layernorm=True),
    "gpt_neox": _of(_QUARTER, num_key_value_heads=6),
    "gpt_neox-serial": _of(_QUARTER, num_key_value_heads=6, use_parallel_residual=False, attention_bias=False),
    "gpt2": dict(
        vocab_size=67, n_embd=40, n_layer=4, n_head=5, n_inner=56, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt2-by_layer": dict(
        vocab_size=67, n_embd=40, n_layer=4, n_head=5, n_inner=56, n_positions=64, bos_token_id=1, eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False,
    ),
    "opt": dict(
        vocab_size=67, hidden_size=40, ffn_dim=56, num_hidden_layers=4, num_attention_heads=5,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    ),
    "opt-post_norm": dict(
        vocab_size=67, hidden_size=40, ffn_dim=56, num_hidden_layers=4, num_attention_heads=5, word_embed_proj_dim=28,
        max_position_embeddings=64, do_layer_norm_before=False, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    ),
    "falcon": _of(_SQUARE, ffn_hidden_size=56, multi_query=True, tie_word_embeddings=True),
    "falcon-grouped": _of(_SQUARE, ffn_hidden_size=56, new_decoder_architecture=True, num_kv_heads=3, bias=True),
    "falcon-one_norm": _of(
        _SQUARE, ffn_hidden_size=56, new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1
    ),
    "falcon-alibi": _of(
        _SQUARE, ffn_hidden_size=56, multi_query=False, alibi=True, parallel_attn=False, bias=True, num_kv_heads=6
    ),
}  # fmt: skip
# Widths that experts are run with are multiples of 8 (grouped_mm).
_EXPERTS: dict[str, Any] = {**_BASE, "hidden_size": 40, "intermediate_size": 24, "num_experts_per_tok": 2}
_SPARSE: dict[str, Any] = {
    **_EXPERTS, "intermediate_size": 56, "num_experts": 5, "moe_intermediate_size": 24,
}  # fmt: skip
_LATENT: dict[str, Any] = _of(
    _EXPERTS, head_dim=None, intermediate_size=56, num_key_value_heads=6, q_lora_rank=20, kv_lora_rank=28,
    qk_nope_head_dim=10, qk_rope_head_dim=12, v_head_dim=14, n_routed_experts=10, num_experts_per_tok=3, n_group=2,
    topk_group=1, n_shared_experts=2, moe_intermediate_size=24, first_k_dense_replace=1,
)  # fmt: skip
TINY |= {
    "mixtral": _of(_EXPERTS, num_local_experts=5, sliding_window=8),
    "qwen2_moe": _of(
        _SPARSE, shared_expert_intermediate_size=32, mlp_only_layers=[1], use_sliding_window=True, sliding_window=8,
        max_window_layers=3,
    ),
    "qwen3_moe": _of(_SPARSE, decoder_sparse_step=2, mlp_only_layers=[], norm_topk_prob=True, attention_bias=True),
    "olmoe": _of(_EXPERTS, head_dim=None, hidden_size=96, num_experts=5, attention_bias=True),
    "olmoe-clipped": _of(
        _EXPERTS, head_dim=None, hidden_size=96, num_experts=5, attention_bias=True, norm_topk_prob=True, clip_qkv=2.0
    ),
    "phimoe": _of(_EXPERTS, num_local_experts=5, attention_bias=True, lm_head_bias=True),
    "granitemoe": _of(
        _EXPERTS, num_local_experts=5, attention_bias=True, embedding_multiplier=3.0, logits_scaling=2.0,
        residual_multiplier=0.7, attention_multiplier=0.3, tie_word_embeddings=True,
    ),
    "gpt_oss": _of(
        _EXPERTS, num_local_experts=5, sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "deepseek_v3": _of(_LATENT, attention_bias=True),
    "deepseek_v3-full_query": _of(_LATENT, q_lora_rank=None, norm_topk_prob=False, rope_interleave=False),
}  # fmt: skip
_DELTA: dict[str, Any] = dict(
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=12, linear_value_head_dim=10,
    partial_rotary_factor=0.5,
)  # fmt: skip
_BETWEEN = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
TINY |= {
    "qwen3_next": _of(
        _SPARSE, **_DELTA, shared_expert_intermediate_size=32, mlp_only_layers=[0], attention_bias=True,
        layer_types=_BETWEEN,
    ),
    "qwen3_5_text": _of(_BASE, hidden_size=44, **_DELTA, attention_bias=True, layer_types=_BETWEEN),
    "qwen3_5_moe_text": _of(
        _SPARSE, **_DELTA, shared_expert_intermediate_size=32, layer_types=_BETWEEN, attention_bias=True
    ),
}  # fmt: skip
for _name, _config in TINY.items():
    if _name.split("-")[0] == "falcon":
        for _key in ("intermediate_size", "num_key_value_heads"):
            _config.pop(_key)
    if _name.startswith("gpt_neox"):
        _config.pop("num_key_value_heads")
TINY = {name: {"model_type": name.split("-")[0], **values} for name, values in TINY.items()}

# Sizes for the tables alone, which no one cuts.
_DENSE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 31,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX: dict[str, Any] = {**_DENSE, "hidden_size": 64, "num_attention_heads": 4}
_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]

NO_NORM: dict[str, Any] = _of(
    _BASE, hidden_size=44, mamba_d_ssm=None, mamba_expand=3, mamba_n_groups=4, mamba_n_heads=12, mamba_d_head="auto",
    mamba_d_state=7, mamba_chunk_size=8, mamba_rms_norm=False, tie_word_embeddings=True, mamba_conv_bias=False,
)  # fmt: skip
PERIODS: dict[str, Any] = _of(
    _SPARSE, **_DELTA, shared_expert_intermediate_size=32, decoder_sparse_step=2, full_attention_interval=3,
    tie_word_embeddings=True,
)  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon_h1-no_norm_tied": NO_NORM,
    "qwen3_next-periods_tied": PERIODS,
    "llama-sparse": {**_DENSE},
    "llama-tied": {**_DENSE, "tie_word_embeddings": True, "num_key_value_heads": None},
    "mistral-untied": {**_DENSE, "head_dim": 6},
    "ministral-windows": {**_DENSE, "head_dim": 6},
    "qwen2-tied": {**_DENSE, "tie_word_embeddings": True},
    "qwen2-list": {**_DENSE, "layer_types": _WINDOWS, "use_sliding_window": True, "sliding_window": 8},
    "qwen3-untied": {**_DENSE, "use_sliding_window": True, "sliding_window": None},
    "gemma-untied": {**_DENSE, "tie_word_embeddings": False, "attention_bias": True, "head_dim": 6},
    "gemma2-untied": {
        **_DENSE, "head_dim": 6, "tie_word_embeddings": False, "attention_bias": True, "layer_types": _WINDOWS
    },
    "gemma3_text-untied": {**_DENSE, "head_dim": 6, "tie_word_embeddings": False, "attention_bias": True},
    "gpt2-untied": {**_GPT2, "tie_word_embeddings": False},
    "gpt2-unscaled": {**_GPT2, "scale_attn_weights": False},
    "gpt2-by_layer_scaled": {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    "gpt_neox-tied": {**_NEOX, "tie_word_embeddings": True, "attention_bias": False},
    "granite-tied": {**_DENSE, "tie_word_embeddings": True},
    "olmo-biases": {**_DENSE, "attention_bias": True},
    "olmo2-tied": {**_DENSE, "tie_word_embeddings": True},
    "olmo3-biases": {**_DENSE, "attention_bias": True, "layer_types": _WINDOWS},
    "smollm3-tied": {**_DENSE, "tie_word_embeddings": True, "attention_bias": True},
    "smollm3-lists": {
        **_DENSE, "no_rope_layers": [0, 1, 1], "layer_types": _WINDOWS, "use_sliding_window": True, "sliding_window": 8
    },
    "cohere-untied": {**_DENSE, "tie_word_embeddings": False, "attention_bias": True, "use_qk_norm": True},
    "olmo-clipped_tied": {**_DENSE, "clip_qkv": 1.0, "tie_word_embeddings": True},
    "cohere2-untied": {**_DENSE, "tie_word_embeddings": False, "attention_bias": True},
    "glm4-unbiased": {**_DENSE, "head_dim": 8, "attention_bias": False},
    "exaone4-tied": {**_DENSE, "tie_word_embeddings": True},
    "nemotron-sparse": {**_DENSE, "hidden_size": 64},
    "starcoder2-unbiased": {**_DENSE, "use_bias": False, "tie_word_embeddings": False},
    "stablelm-tied": {**_DENSE, "hidden_size": 64, "tie_word_embeddings": True},
    "opt-untied": {
        "hidden_size": 36, "ffn_dim": 52, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97,
        "max_position_embeddings": 31, "tie_word_embeddings": False, "enable_bias": False,
        "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt-post_norm_untied": {
        "hidden_size": 36, "ffn_dim": 52, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97,
        "word_embed_proj_dim": 20, "do_layer_norm_before": False, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon-grouped_untied": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 97,
        "tie_word_embeddings": False, "new_decoder_architecture": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "falcon-one_norm_untied": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 97,
        "tie_word_embeddings": False, "new_decoder_architecture": True, "bos_token_id": 1, "eos_token_id": 2,
        "num_ln_in_parallel_attn": 1, "bias": True,
    },
    "falcon-untied": {
        "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 97, "bias": True,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""What TINY does not show: other biases, ties, lists, legacy spellings."""
