"""What families with the gated delta rule share (Yang, Kautz and Hatamizadeh, arXiv 2412.06464)."""

from __future__ import annotations

from minitron_cli.families.schema import Axis, Divides, LayerRule, Norm, Tensor

# repeat_interleave(num_v_heads // num_k_heads) gives each key head its own run of value heads.
KEY_HEADS, GROUP = "linear_key_heads", "linear_group"
VALUE_HEADS = f"{KEY_HEADS}*{GROUP}"
VALUES = f"{VALUE_HEADS}*linear_value_dim"
QUERIES = f"{KEY_HEADS}*linear_key_dim"
CONV = f"{QUERIES} + {QUERIES} + {VALUES}"
STATE = f"({CONV})*linear_conv + {VALUES}*linear_key_dim"
# torch_chunk_gated_delta_rule: products and decays of all pairs in a chunk, keys of every value head, the values.
SCAN = (f"6*chunk*{VALUE_HEADS} + 6*{VALUE_HEADS}*linear_key_dim + 5*{VALUES}", 64)
NESTED = ("linear_value_dim", "linear_group", "linear_key_heads")
DIVIDES = Divides(
    "linear_value_heads",
    "linear_key_heads",
    "torch_chunk_gated_delta_rule: repeat_interleave(num_v_heads // num_k_heads)",
)

AXES = (
    Axis(KEY_HEADS, "linear_num_key_heads", prunable=True, per_layer=True),
    Axis("linear_value_heads", "linear_num_value_heads", prunable=True),
    Axis(GROUP, default="linear_value_heads // linear_key_heads", within=KEY_HEADS, per_layer=True),
    # Nothing rotates: every key head may keep its own channels, the same of queries and keys.
    Axis("linear_key_dim", "linear_key_head_dim", prunable=True, within=KEY_HEADS, per_layer=True),
    # One norm weight serves the channels of all value heads.
    Axis("linear_value_dim", "linear_value_head_dim", prunable=True, per_layer=True),
    Axis("linear_conv", "linear_conv_kernel_dim", why_not="its units are positions in time, not channels"),
)

DEFAULTS = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "attention_bias": False,
    "tie_word_embeddings": False,
}

LAYER_TYPES = LayerRule(
    "layer_types",
    "list",
    absent=LayerRule("full_attention_interval", "period", {"in": "full_attention", "out": "linear_attention"}),
)


def tensors(mixer: str, tags: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a mixer behind its input projections; `mixer` is what their names begin with."""
    return {
        mixer + "conv1d.weight": Tensor((CONV, "1", "linear_conv"), tags=tags),
        mixer + "dt_bias": Tensor((VALUE_HEADS,), tags=tags),
        mixer + "A_log": Tensor((VALUE_HEADS,), tags=tags),
        # Unlike the families' other norms this one applies w, not 1 + w. Queries have length 1, so that their scale,
        # which no weight carries, reaches it: against a larger state its epsilon is smaller.
        mixer + "norm.weight": Tensor(
            ("linear_value_dim",), tags=tags, role="norm", norm=Norm(divided_by="linear_key_dim")
        ),
        mixer + "out_proj.weight": Tensor(("hidden", VALUES), tags=tags),
    }
