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
# Where the class computes head_dim = hidden / heads; a quarter of 16 channels is two rotary pairs.
_SQUARE: dict[str, Any] = {**_BASE, "hidden_size": 96, "head_dim": None}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _of(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    merged = {**base, **changes}
    return {key: value for key, value in merged.items() if not (key == "head_dim" and value is None)}


TINY: dict[str, dict[str, Any]] = {
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
    "stablelm": _of(_SQUARE, use_qkv_bias=True),
    "stablelm-parallel": _of(_SQUARE, use_parallel_residual=True),
    "phi": _of(_BASE, hidden_size=44),
    "phi-qk_norm": _of(_SQUARE, qk_layernorm=True),
    "gpt_neox": _of(_SQUARE, num_key_value_heads=6),
    "gpt_neox-serial": _of(_SQUARE, num_key_value_heads=6, use_parallel_residual=False, attention_bias=False),
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
    "falcon": _of(_SQUARE, ffn_hidden_size=56, multi_query=True, tie_word_embeddings=True),
    "falcon-grouped": _of(_SQUARE, ffn_hidden_size=56, new_decoder_architecture=True, num_kv_heads=3, bias=True),
    "falcon-one_norm": _of(
        _SQUARE, ffn_hidden_size=56, new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1
    ),
    "falcon-alibi": _of(
        _SQUARE, ffn_hidden_size=56, multi_query=False, alibi=True, parallel_attn=False, bias=True, num_kv_heads=6
    ),
}  # fmt: skip
for _name, _config in TINY.items():
    if _name.startswith("falcon"):
        for _key in ("intermediate_size", "num_key_value_heads"):
            _config.pop(_key)
    if _name.startswith("gpt_neox"):
        _config.pop("num_key_value_heads")
TINY = {name: {"model_type": name.split("-")[0], **values} for name, values in TINY.items()}
