"""What families with Mamba-2 layers share (Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_cli.families.schema import Axis, Divides, Norm, Tap, Tensor

# Heads of one group share the group's B and C: repeat_interleave(num_heads // num_groups).
HEADS = "mamba_groups*mamba_group"
INNER = HEADS + "*mamba_head_dim"
CONV = INNER + " + mamba_groups*mamba_state + mamba_groups*mamba_state"
IN = f"{INNER} + {CONV} + {HEADS}"  # gate, convolved x B C, time step
STATE = f"({CONV})*mamba_conv + {INNER}*mamba_state"
# mamba2_chunk_scan: scores and decays of all pairs in a chunk, B and C of every head, the inner channels.
SCAN = f"4*chunk*{HEADS} + 3*{HEADS}*mamba_state + 4*{INNER}"
NESTED = ("mamba_head_dim", "mamba_group", "mamba_groups")
UNPADDED = "the mixer's in_proj adds its bias to padding after apply_mask_to_padding_states, and conv1d reads that"
DIVIDES = Divides("mamba_heads", "mamba_groups", "mamba2_chunk_scan: B.repeat_interleave(num_heads // num_groups)")


def axes(*, groups: str, heads: str, head_dim: Axis, state: str, conv: str) -> tuple[Axis, ...]:
    """The axes, given their config keys."""
    return (
        Axis("mamba_groups", groups, prunable=True, per_layer=True),
        Axis("mamba_heads", heads, prunable=True),
        Axis("mamba_group", default="mamba_heads // mamba_groups", within="mamba_groups", per_layer=True),
        head_dim,
        Axis("mamba_state", state, why_not="every head of a group reads the same state; kept whole so far"),
        Axis("mamba_conv", conv, why_not="its units are positions in time, not channels"),
    )


def tensors(
    mixer: str, tags: tuple[str, ...], *, norm: Norm, biases: Mapping[str, str], norm_if: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of a mixer.

    Args:
        mixer: what their names begin with.
        biases: in_proj, conv1d and out_proj to the config key that gives it a bias.
        norm_if: conditions under which there is a gated norm.
    """
    return {
        mixer + "in_proj.weight": Tensor((IN, "hidden"), tags=tags),
        mixer + "in_proj.bias": Tensor((IN,), tags=tags, conditions=(biases["in_proj"],)),
        mixer + "conv1d.weight": Tensor((CONV, "1", "mamba_conv"), tags=tags),
        mixer + "conv1d.bias": Tensor((CONV,), tags=tags, conditions=(biases["conv1d"],)),
        mixer + "dt_bias": Tensor((HEADS,), tags=tags),
        mixer + "A_log": Tensor((HEADS,), tags=tags),
        mixer + "D": Tensor((HEADS,), tags=tags),
        mixer + "norm.weight": Tensor((INNER,), tags=tags, conditions=norm_if, role="norm", norm=norm),
        mixer + "out_proj.weight": Tensor(("hidden", INNER), tags=tags),
        mixer + "out_proj.bias": Tensor(("hidden",), tags=tags, conditions=(biases["out_proj"],)),
    }


def taps(mixer: str, tags: tuple[str, ...]) -> dict[str, tuple[Tap, ...]]:
    """Where its output projection reads, and where W_x puts x out (the second term of the input projection)."""
    return {
        "mixer": (Tap(mixer + "out_proj", "input", INNER, tags=tags),),
        "nested": (Tap(mixer + "in_proj", "output", IN, tags=tags, part=1),),
    }
