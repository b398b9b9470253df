"""DeepSeek-V3: latent attention (queries, keys and values behind low-rank projections), leading dense layers, experts.

Published files are FP8 with a `weight_scale_inv` beside each matrix; the table describes unpacked weights.
"""

from __future__ import annotations

from minitron_cli.families.mixtral import GROUPED
from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Least, Norm, Rotary, Tap, Tensor

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_EXPERT, _SHARED = _LAYER + "mlp.experts.{expert}.", _LAYER + "mlp.shared_experts."
_QUERY = "heads*(qk_nope + qk_rope)"
_DENSE, _MOE, _LOW_RANK, _BIAS = ("dense",), ("moe",), ("q_lora_rank",), ("attention_bias",)
# DeepseekV3Attention builds its latent norms without passing rms_norm_eps.
_LATENT_NORM = Norm(eps_key="", eps=1e-6)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True, per_layer=True),
        Axis(
            "kv_heads",
            "num_key_value_heads",
            "heads",
            why_not="DeepseekV3Attention.expand_kv gives each query head its key and value; they follow --heads",
        ),
        # A null rank means one full query projection and no latent.
        Axis("q_rank", "q_lora_rank", 0, prunable=True, per_layer=True),
        Axis("kv_rank", "kv_lora_rank", prunable=True, per_layer=True),
        Axis("qk_nope", "qk_nope_head_dim", why_not="DeepseekV3Attention: scaling = (qk_nope + qk_rope) ** (-0.5)"),
        Axis("qk_rope", "qk_rope_head_dim", why_not="one rotated key is shared by all heads"),
        Axis("v_head_dim", "v_head_dim", prunable=True, within="heads", per_layer=True),
        Axis("experts", "n_routed_experts", prunable=True, evenly="expert_groups", per_layer=True),
        Axis("expert_groups", "n_group", why_not="the router picks groups before experts"),
        Axis("chosen_groups", "topk_group", why_not="the router picks groups before experts"),
        Axis("expert_ffn", "moe_intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("shared_experts", "n_shared_experts", why_not="cut the rows of the shared expert: it is one MLP"),
        # DeepseekV3MoE: intermediate_size = moe_intermediate_size * n_shared_experts
        Axis("shared_ffn", default="expert_ffn * shared_experts", per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
    ),
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        _LAYER + "input_layernorm.weight": Tensor(("hidden",), role="norm"),
        _ATTENTION + "q_proj.weight": Tensor((_QUERY, "hidden"), conditions=("!q_lora_rank",), role="query"),
        _ATTENTION + "q_a_proj.weight": Tensor(("q_rank", "hidden"), conditions=_LOW_RANK),
        _ATTENTION + "q_a_proj.bias": Tensor(("q_rank",), conditions=_LOW_RANK + _BIAS),
        _ATTENTION + "q_a_layernorm.weight": Tensor(("q_rank",), conditions=_LOW_RANK, role="norm", norm=_LATENT_NORM),
        _ATTENTION + "q_b_proj.weight": Tensor((_QUERY, "q_rank"), conditions=_LOW_RANK, role="query"),
        _ATTENTION + "kv_a_proj_with_mqa.weight": Tensor(("kv_rank + qk_rope", "hidden")),
        _ATTENTION + "kv_a_proj_with_mqa.bias": Tensor(("kv_rank + qk_rope",), conditions=_BIAS),
        _ATTENTION + "kv_a_layernorm.weight": Tensor(("kv_rank",), role="norm", norm=_LATENT_NORM),
        _ATTENTION + "kv_b_proj.weight": Tensor(("heads*(qk_nope + v_head_dim)", "kv_rank")),
        _ATTENTION + "o_proj.weight": Tensor(("hidden", "heads*v_head_dim")),
        _ATTENTION + "o_proj.bias": Tensor(("hidden",), conditions=_BIAS),
        _LAYER + "post_attention_layernorm.weight": Tensor(("hidden",), role="norm"),
        _LAYER + "mlp.gate_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.up_proj.weight": Tensor(("ffn", "hidden"), tags=_DENSE),
        _LAYER + "mlp.down_proj.weight": Tensor(("hidden", "ffn"), tags=_DENSE),
        _LAYER + "mlp.gate.weight": Tensor(("experts", "hidden"), tags=_MOE, role="router"),
        _LAYER + "mlp.gate.e_score_correction_bias": Tensor(("experts",), tags=_MOE, role="buffer"),
        _EXPERT + "gate_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
        _EXPERT + "up_proj.weight": Tensor(("expert_ffn", "hidden"), tags=_MOE),
        _EXPERT + "down_proj.weight": Tensor(("hidden", "expert_ffn"), tags=_MOE),
        _SHARED + "gate_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "up_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "down_proj.weight": Tensor(("hidden", "shared_ffn"), tags=_MOE),
        "model.norm.weight": Tensor(("hidden",), role="norm"),
        "lm_head.weight": Tensor(("vocab", "hidden"), conditions=("!tie_word_embeddings",)),
    },
    taps={
        "hidden": (
            Tap(_LAYER + "input_layernorm", "output", "hidden"),
            Tap(_LAYER + "post_attention_layernorm", "output", "hidden"),
        ),
        "attention": (Tap(_ATTENTION + "o_proj", "input", "heads*v_head_dim"),),
        "q_rank": (Tap(_ATTENTION + "q_b_proj", "input", "q_rank", conditions=_LOW_RANK),),
        "kv_rank": (Tap(_ATTENTION + "kv_a_layernorm", "output", "kv_rank"),),
        "ffn": (Tap(_LAYER + "mlp.down_proj", "input", "ffn", tags=_DENSE),),
        "experts": (Tap(_LAYER + "mlp.experts", "input", "hidden", tags=_MOE),),
        "shared_ffn": (Tap(_SHARED + "down_proj", "input", "shared_ffn", tags=_MOE),),
        "mlp": (Tap(_LAYER + "mlp", "input", "hidden"),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    layer_rules=(LayerRule("first_k_dense_replace", "leading", {"in": "dense", "out": "moe"}),),
    divides=(
        Divides("experts", "expert_groups", "DeepseekV3TopkRouter: view(-1, num_group, num_experts // num_group)"),
        *GROUPED,
    ),
    least=(Least("experts", "2*expert_groups", "DeepseekV3TopkRouter: group scores are the sum of topk(2)"),),
    choosable="chosen_groups * experts // expert_groups",
    # Keys and values are expanded to one per query head; repeat_kv must then repeat nothing.
    coupled={"kv_heads": "heads"},
    rotary=Rotary(axis="qk_rope", layout="interleaved"),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    dropped={
        r"model\.layers\.(?P<beyond>\d+)\..+": "multi-token-prediction layers: the stock class does not load them",
    },
    dropped_config={"num_nextn_predict_layers": 0},
    cache={"": "kv_rank + qk_rope"},
    attention="heads*(qk_nope + qk_rope + v_head_dim)",
)
