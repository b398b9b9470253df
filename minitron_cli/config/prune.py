"""Options of `minitron prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from minitron_cli.config.base import ExportingConfig, argument, option
from minitron_cli.config.importance import ExpertScore, LayerScore, WidthScore
from minitron_cli.errors import ConfigError

Rescale = Literal["auto", "measured", "analytic", "off"]
"""How norms are rescaled when hidden channels leave."""

Rotate = Literal["auto", "on", "off"]
"""Whether hidden units are directions of the residual stream."""

Size = Annotated[int, Ge(1)] | None

SIZES = (
    "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "experts", "expert_ffn", "shared_ffn", "expert_latent",
    "q_rank", "kv_rank", "v_head_dim", "mamba_groups", "mamba_heads", "mamba_head_dim", "linear_key_heads",
    "linear_value_heads", "linear_key_dim", "linear_value_dim",
)  # fmt: skip
"""Axes that have an option."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig(ExportingConfig):
    """Cut a checkpoint to explicit sizes; what is not named stays as it is."""

    checkpoint: str = argument("Checkpoint to cut: directory, Hub id or builtin:tiny-py.", keyed=False)
    importance: Path | None = option(
        None, "Scores from `minitron importance`; without it weight norms decide.", keyed=False
    )
    plan: Path | None = option(None, "Execute this plan file (JSON, as --dry-run --json prints it).", keyed=False)
    search: Path | None = option(None, "Execute the plan that `minitron search` chose.", keyed=False)
    params: str | None = option(None, "Which size, as it was written, of a --search for several: 4B.")
    layers: Size = option(None, "Decoder layers to keep.")
    hidden: Size = option(None, "Hidden size.")
    ffn: Size = option(None, "MLP width (intermediate size).")
    heads: Size = option(None, "Query heads, cut inside each KV group.")
    kv_heads: Size = option(None, "KV heads; each leaves with its query heads.")
    head_dim: Size = option(None, "Channels per head.")
    experts: Size = option(None, "Routed experts per layer; the router loses their rows.")
    expert_ffn: Size = option(None, "Width of each routed expert.")
    shared_ffn: Size = option(None, "Width of the shared expert.")
    expert_latent: Size = option(None, "Channels that routed experts read and write, where these are not the hidden.")
    q_rank: Size = option(None, "Latent attention: rank of the queries.")
    kv_rank: Size = option(None, "Latent attention: rank of keys and values, which is what the cache holds.")
    v_head_dim: Size = option(None, "Latent attention: channels per value head.")
    mamba_groups: Size = option(None, "Mamba-2 groups; each leaves with its heads.")
    mamba_heads: Size = option(None, "Mamba-2 heads, cut inside each group.")
    mamba_head_dim: Size = option(None, "Channels per Mamba-2 head.")
    linear_key_heads: Size = option(None, "Key heads of linear attention; each leaves with its value heads.")
    linear_value_heads: Size = option(None, "Value heads of linear attention, cut inside each key head.")
    linear_key_dim: Size = option(None, "Channels per key head of linear attention.")
    linear_value_dim: Size = option(None, "Channels per value head of linear attention.")
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    width_score: WidthScore = option(
        "auto",
        "What decides which neurons and heads leave: activations, these weighted by outgoing weights (contribution), "
        "or the variance of that (fluctuation); auto takes fluctuation for neurons, activations for heads.",
    )
    expert_score: ExpertScore = option(
        "reap",
        "What decides which routed experts leave: router weight times norm of the output over an expert's own tokens "
        "(reap), norm of the output over all tokens (activation), or the share of tokens (frequency).",
    )
    drop_layers: tuple[Annotated[int, Ge(0)], ...] = option(
        (), "Remove exactly these layers instead: 0-based, separated by commas.", commas=True
    )
    rescale: Rescale = option(
        "auto",
        "Scale norms to the energy that stays when hidden channels leave: as measured by importance, as if all stayed "
        "(analytic), or not; auto measures where it rotates.",
    )
    rotate: Rotate = option(
        "auto",
        "Rotate the residual stream before hidden channels leave, so that its directions of least energy do; auto does "
        "where the family allows it and importance has the directions.",
    )
    untie: bool = option(
        False,
        "Under rotation, give a head that is the embedding table a matrix of its own. That is exact and costs vocab x "
        "hidden parameters; otherwise one table serves both, halfway between what each would be.",
    )
    repair: Literal["auto", "on", "off"] = option(
        "auto",
        "Fit the projections that end attention and MLP again, so that the residual stream stays that of the original; "
        "auto does where there is --data.",
    )
    data: Path | None = option(None, "Prepared data set whose train split repairs.", keyed=False)
    repair_samples: Annotated[int, Ge(8)] = option(256, "Sequences to repair on.")
    batch_size: Annotated[int, Ge(1)] = option(8, "Sequences per forward pass of a repair.")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the draw of these sequences.")
    device: str = option("auto", "Where a repair runs: auto, cpu, cuda, cuda:N, mps.")
    dtype: str = option("auto", "Its compute type: auto (bf16 on CUDA, else fp32), float32, bfloat16, float16.")
    text_only: bool = option(False, "Of a multimodal checkpoint, write the text model alone.")
    shard_bytes: Annotated[int, Ge(1)] = option(5_000_000_000, "Largest size of one weights file.")

    def check(self) -> None:
        super().check()
        if sum(source is not None for source in (self.plan, self.search)) + bool(self.target()) > 1:
            raise ConfigError("Give sizes, --plan or --search, only one of the three.")
        if self.params is not None and self.search is None:
            raise ConfigError("--params names one size of a --search; give that too, or sizes such as --hidden 3072.")
        if self.drop_layers and self.layers is not None:
            raise ConfigError("Give --layers or --drop-layers, not both.")
        planned = self.plan is not None or self.search is not None
        if planned and (self.rotate != "auto" or self.untie or self.rescale != "auto"):
            raise ConfigError(
                "A plan says itself whether it rotates and rescales; give --rotate and --rescale when it is made."
            )
        if self.rotate == "on" and self.hidden is None:
            raise ConfigError("--rotate prepares the cut of hidden channels; give --hidden.")
        if self.untie and self.rotate != "on":
            raise ConfigError("--untie says what becomes of the head under --rotate on; give that too.")
        if self.repair == "on" and self.data is None and not planned:
            raise ConfigError("--repair on needs --data: text to fit the projections on.")

    def target(self) -> dict[str, int]:
        """The sizes the user asked for."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}
