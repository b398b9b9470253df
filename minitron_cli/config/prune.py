"""Options of `minitron prune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from minitron_cli.config.base import WritingConfig, argument, option
from minitron_cli.config.importance import LayerScore
from minitron_cli.errors import ConfigError

Size = Annotated[int, Ge(1)] | None


@dataclass(frozen=True, kw_only=True)
class PruneConfig(WritingConfig):
    """Cut a checkpoint to explicit sizes; what is not named stays as it is."""

    checkpoint: str = argument("Checkpoint to cut: directory, Hub id or builtin:tiny-py.", keyed=False)
    importance: Path | None = option(
        None, "Scores from `minitron importance`; without it weight norms decide.", keyed=False
    )
    plan: Path | None = option(None, "Execute this plan file (JSON, as --dry-run --json prints it).", keyed=False)
    search: Path | None = option(None, "Execute the plan that `minitron search` chose.", keyed=False)
    layers: Size = option(None, "Decoder layers to keep.")
    hidden: Size = option(None, "Hidden size.")
    ffn: Size = option(None, "MLP width (intermediate size).")
    heads: Size = option(None, "Query heads, cut inside each KV group.")
    kv_heads: Size = option(None, "KV heads; each leaves with its query heads.")
    head_dim: Size = option(None, "Channels per head.")
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    drop_layers: tuple[Annotated[int, Ge(0)], ...] = option(
        (), "Remove exactly these layers instead: 0-based, separated by commas.", commas=True
    )
    text_only: bool = option(False, "Of a multimodal checkpoint, write the text model alone.")
    shard_bytes: Annotated[int, Ge(1)] = option(5_000_000_000, "Largest size of one weights file.")

    def check(self) -> None:
        if sum(source is not None for source in (self.plan, self.search)) + bool(self.target()) > 1:
            raise ConfigError("Give sizes, --plan or --search, only one of the three.")
        if self.drop_layers and self.layers is not None:
            raise ConfigError("Give --layers or --drop-layers, not both.")

    def target(self) -> dict[str, int]:
        """The sizes the user asked for."""
        names = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
