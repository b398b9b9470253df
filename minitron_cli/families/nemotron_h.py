"""Nemotron-H and Nemotron 3: each layer is one mixer (Mamba-2, attention, MLP or experts) behind one norm.

Names on disk start with "backbone.", modules in memory with "model.".
"""

from __future__ import annotations

from minitron_cli.families import mamba2
from minitron_cli.families.mixtral import GROUPED
from minitron_cli.families.schema import Axis, Divides, Family, LayerRule, Least, Norm, Tap, Tensor

_MIXER, _TAP = "backbone.layers.{layer}.mixer.", "model.layers.{layer}.mixer."
_EXPERT, _SHARED = _MIXER + "experts.{expert}.", _MIXER + "shared_experts."
_MAMBA, _ATTENTION, _MLP, _MOE = ("linear_attention",), ("full_attention",), ("mlp",), ("moe",)
_LATENT, _MLP_BIAS = ("moe_latent_size",), ("mlp_bias",)

_GROUPED = GROUPED[0].source

NEMOTRON_H = Family(
    name="nemotron_h",
    model_types=("nemotron_h",),
    axes=(
        Axis("layers", "num_hidden_layers", prunable=True, length_of=("layers_block_type", "hybrid_override_pattern")),
        Axis("hidden", "hidden_size", prunable=True),
        Axis("ffn", "intermediate_size", prunable=True, per_layer=True),
        Axis("heads", "num_attention_heads", prunable=True),
        Axis("kv_heads", "num_key_value_heads", prunable=True, per_layer=True),
        # No rotation: every KV head may keep its own query and key channels.
        Axis("head_dim", "head_dim", prunable=True, within="kv_heads", per_layer=True),
        Axis("group", default="heads // kv_heads", within="kv_heads", per_layer=True),
        Axis("v_head_dim", default="head_dim", within="kv_heads", per_layer=True),
        *mamba2.axes(
            groups="n_groups",
            heads="mamba_num_heads",
            head_dim=Axis("mamba_head_dim", "mamba_head_dim", prunable=True, per_layer=True),
            state="ssm_state_size",
            conv="conv_kernel",
        ),
        Axis("experts", "n_routed_experts", prunable=True, evenly="expert_groups", per_layer=True),
        Axis("expert_groups", "n_group", why_not="the router picks groups before experts"),
        Axis("chosen_groups", "topk_group", why_not="the router picks groups before experts"),
        Axis("expert_ffn", "moe_intermediate_size", prunable=True, within="experts", per_layer=True),
        Axis("shared_ffn", "moe_shared_expert_intermediate_size", prunable=True, per_layer=True),
        Axis("expert_latent", "moe_latent_size", 0, prunable=True, per_layer=True),
        Axis("vocab", "vocab_size", why_not="the tokenizer decides it"),
    ),
    tensors={
        "backbone.embeddings.weight": Tensor(("vocab", "hidden")),
        "backbone.layers.{layer}.norm.weight": Tensor(("hidden",), role="norm"),
        **mamba2.tensors(
            _MIXER,
            _MAMBA,
            norm=Norm(eps_key="layer_norm_epsilon", eps=1e-5, per="mamba_groups"),
            biases={"in_proj": "use_bias", "conv1d": "use_conv_bias", "out_proj": "use_bias"},
        ),
        # The stock class builds attention without biases whatever attention_bias says.
        _MIXER + "q_proj.weight": Tensor(("kv_heads*group*head_dim", "hidden"), tags=_ATTENTION, role="query"),
        _MIXER + "k_proj.weight": Tensor(("kv_heads*head_dim", "hidden"), tags=_ATTENTION),
        _MIXER + "v_proj.weight": Tensor(("kv_heads*v_head_dim", "hidden"), tags=_ATTENTION),
        _MIXER + "o_proj.weight": Tensor(("hidden", "kv_heads*group*v_head_dim"), tags=_ATTENTION),
        _MIXER + "up_proj.weight": Tensor(("ffn", "hidden"), tags=_MLP),
        _MIXER + "up_proj.bias": Tensor(("ffn",), tags=_MLP, conditions=_MLP_BIAS),
        _MIXER + "down_proj.weight": Tensor(("hidden", "ffn"), tags=_MLP),
        _MIXER + "down_proj.bias": Tensor(("hidden",), tags=_MLP, conditions=_MLP_BIAS),
        _MIXER + "gate.weight": Tensor(("experts", "hidden"), tags=_MOE, role="router"),
        _MIXER + "gate.e_score_correction_bias": Tensor(("experts",), tags=_MOE, role="buffer"),
        _MIXER + "fc1_latent_proj.weight": Tensor(("expert_latent", "hidden"), tags=_MOE, conditions=_LATENT),
        _MIXER + "fc1_latent_proj.bias": Tensor(("expert_latent",), tags=_MOE, conditions=_LATENT + _MLP_BIAS),
        _MIXER + "fc2_latent_proj.weight": Tensor(("hidden", "expert_latent"), tags=_MOE, conditions=_LATENT),
        _MIXER + "fc2_latent_proj.bias": Tensor(("hidden",), tags=_MOE, conditions=_LATENT + _MLP_BIAS),
        _EXPERT + "up_proj.weight": Tensor(
            ("expert_ffn", "expert_latent"), _MOE, _LATENT, otherwise=Tensor(("expert_ffn", "hidden"), _MOE)
        ),
        _EXPERT + "down_proj.weight": Tensor(
            ("expert_latent", "expert_ffn"), _MOE, _LATENT, otherwise=Tensor(("hidden", "expert_ffn"), _MOE)
        ),
        _SHARED + "up_proj.weight": Tensor(("shared_ffn", "hidden"), tags=_MOE),
        _SHARED + "up_proj.bias": Tensor(("shared_ffn",), tags=_MOE, conditions=_MLP_BIAS),
        _SHARED + "down_proj.weight": Tensor(("hidden", "shared_ffn"), tags=_MOE),
        _SHARED + "down_proj.bias": Tensor(("hidden",), tags=_MOE, conditions=_MLP_BIAS),
        "backbone.norm_f.weight": Tensor(("hidden",), role="norm"),
        # The stock class ties nothing, whatever tie_word_embeddings says.
        "lm_head.weight": Tensor(("vocab", "hidden")),
    },
    taps={
        "hidden": (Tap("model.layers.{layer}.norm", "output", "hidden"),),
        **mamba2.taps(_TAP, _MAMBA),
        "attention": (Tap(_TAP + "o_proj", "input", "kv_heads*group*v_head_dim", tags=_ATTENTION),),
        "ffn": (Tap(_TAP + "down_proj", "input", "ffn", tags=_MLP),),
        "experts": (
            Tap(_TAP + "experts", "input", "hidden", tags=_MOE, conditions=("!moe_latent_size",)),
            Tap(_TAP + "experts", "input", "expert_latent", tags=_MOE, conditions=_LATENT),
        ),
        "shared_ffn": (Tap(_TAP + "shared_experts.down_proj", "input", "shared_ffn", tags=_MOE),),
        "expert_latent": (Tap(_TAP + "fc1_latent_proj", "output", "expert_latent", tags=_MOE, conditions=_LATENT),),
        "mlp": tuple(Tap("model.layers.{layer}.mixer", "input", "hidden", tags=tags) for tags in (_MLP, _MOE)),
        "query": (Tap(_TAP + "q_proj", "output", "kv_heads*group*head_dim", tags=_ATTENTION),),
        "key": (Tap(_TAP + "k_proj", "output", "kv_heads*head_dim", tags=_ATTENTION),),
        "value": (Tap(_TAP + "v_proj", "output", "kv_heads*v_head_dim", tags=_ATTENTION),),
        "block": (Tap("model.layers.{layer}", "output", "hidden"),),
        "head": (Tap("lm_head", "input", "hidden"),),
    },
    defaults={
        "chunk_size": 128,
        "hybrid_override_pattern": "ME*-",
        "head_dim": 128,
        "num_key_value_heads": 8,
        "n_groups": 8,
        "conv_kernel": 4,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "use_bias": False,
        "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 7688,
        "mlp_bias": False,
    },
    layer_rules=(
        LayerRule(
            "layers_block_type",
            "list",
            {"mamba": "linear_attention", "attention": "full_attention"},
            absent=LayerRule(
                "hybrid_override_pattern",
                "pattern",
                {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"},
            ),
        ),
    ),
    required={"full_attention": "DynamicCache.get_seq_length: can only be called on Attention layers"},
    divides=(
        Divides("heads", "kv_heads", "repeat_kv: num_key_value_groups = num_attention_heads // num_key_value_heads"),
        mamba2.DIVIDES,
        Divides("experts", "expert_groups", "NemotronHTopkRouter: view(-1, num_group, num_experts // num_group)"),
        Divides("expert_ffn", "8", _GROUPED),
        Divides("expert_latent", "8", _GROUPED),
        Divides("hidden", "8", _GROUPED, beside="experts", conditions=("!moe_latent_size",)),
    ),
    least=(Least("experts", "2*expert_groups", "NemotronHTopkRouter: group scores are the sum of topk(2)"),),
    choosable="chosen_groups * experts // expert_groups",
    norm=Norm(eps_key="layer_norm_epsilon", eps=1e-5),
    modules=("backbone.", "model."),
    nested=mamba2.NESTED,
    unpadded={"use_bias": mamba2.UNPADDED},
    dropped={r"mtp\..+": "multi-token-prediction layers: the stock class does not load them"},
    dropped_config={"num_nextn_predict_layers": 0},
    cache={"full_attention": "kv_heads*(head_dim + v_head_dim)"},
    state={"linear_attention": mamba2.STATE},
    scan=(mamba2.SCAN, "chunk_size"),
)
