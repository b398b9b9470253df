"""Options of training that several processes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minitron_cli.config.base import StageConfig, option


@dataclass(frozen=True, kw_only=True)
class ShardingConfig(StageConfig):
    """How models are spread over the processes of a `torchrun`; with one process nothing is."""

    shard: Literal["auto", "both", "teacher", "none"] = option(
        "auto", "Models to split over the processes of a torchrun; auto keeps those whole that take little memory.",
        keyed=False,
    )  # fmt: skip
    keep_gathered: bool = option(
        False, "Keep split layers gathered until the backward pass: less traffic, more memory.", keyed=False
    )
    offload: bool = option(
        False, "Keep the split student's weights and optimizer state in main memory: less device memory, slower.",
        keyed=False,
    )  # fmt: skip
