"""Options of `minitron prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from minitron_cli.config.base import ExportingConfig, argument, option
from minitron_cli.config.importance import LayerScore, WidthScore
from minitron_cli.errors import ConfigError

Rescale = Literal["auto", "measured", "analytic", "off"]
"""How norms are rescaled when hidden channels leave."""

Size = Annotated[int, Ge(1)] | None


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
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    width_score: WidthScore = option(
        "activation",
        "What decides which neurons and heads leave: activations, these weighted by outgoing weights (contribution), "
        "or the variance of that (fluctuation).",
    )
    drop_layers: tuple[Annotated[int, Ge(0)], ...] = option(
        (), "Remove exactly these layers instead: 0-based, separated by commas.", commas=True
    )
    rescale: Rescale = option(
        "auto",
        "Scale norms to the energy that stays when hidden channels leave: as measured by importance, as if all stayed "
        "(analytic), or not; auto measures where it rotates.",
    )
    rotate: bool = option(
        False,
        "Rotate the residual stream before hidden channels leave, so that its directions of least energy do; needs "
        "importance with --collect directions, and gives tied embeddings a head of its own.",
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
        if planned and (self.rotate or self.rescale != "auto"):
            raise ConfigError(
                "A plan says itself whether it rotates and rescales; give --rotate and --rescale when it is made."
            )
        if self.rotate and self.hidden is None:
            raise ConfigError("--rotate prepares the cut of hidden channels; give --hidden.")

        if self.repair == "on" and self.data is None and not planned:
            raise ConfigError("--repair on needs --data: text to fit the projections on.")

    def target(self) -> dict[str, int]:
        """The sizes the user asked for."""
        names = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
