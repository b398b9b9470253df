"""Options of `minitron plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from minitron_cli.config.base import StageConfig, argument, option


@dataclass(frozen=True, kw_only=True)
class PlanConfig(StageConfig):
    """What a recipe will hold and take on so many devices; the teacher's config.json is enough, no device is needed."""

    recipe: str = argument("A YAML file, or a shipped name, as in `run`.")
    set: tuple[str, ...] = option((), "Change a recipe key, such as distill.steps=400; repeat for more.")
    devices: Annotated[int, Ge(1)] = option(1, "Processes, each with a device of its own.")
    device: str = option(
        "here", "a100, h100, h200, b200, l40s, l4, a10, rtx4090, mi300x; or here: this machine's own, measured."
    )
    memory: str | None = option(None, "Memory of each device, such as 80GB; default that of --device.")
    peak: Annotated[float, Gt(0)] | None = option(
        None, "Operations per second of each device, such as 312e12, instead of that of --device."
    )
    mfu: Annotated[float, Gt(0), Le(1)] = option(
        0.4, "Share of the peak that training reaches; not applied where the speed is measured."
    )
