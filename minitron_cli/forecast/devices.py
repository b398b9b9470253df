"""What accelerators offer by their makers' data sheets, and what this machine does."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

import torch

from minitron_cli.config.plan import PlanConfig
from minitron_cli.errors import ConfigError
from minitron_cli.runtime.device import pick_device
from minitron_cli.runtime.memory import total_bytes


@dataclass(frozen=True)
class Device:
    """`peak`: bf16 operations per second without sparsity, None where speed is measured; `memory` in bytes; `kind` as
    torch calls it.
    """

    name: str
    peak: float | None
    memory: int
    kind: str = "cuda"


DEVICES = {
    each.name: each
    for each in (
        Device("b200", 2250e12, 180_000_000_000),
        Device("h200", 989e12, 141_000_000_000),
        Device("h100", 989e12, 80_000_000_000),
        Device("a100", 312e12, 80_000_000_000),
        Device("mi300x", 1307e12, 192_000_000_000),
        Device("l40s", 362e12, 48_000_000_000),
        Device("rtx4090", 165e12, 24_000_000_000),
        Device("a10", 125e12, 24_000_000_000),
        Device("l4", 121e12, 24_000_000_000),
    )
}


def known_as(name: str) -> Device | None:
    """The entry for a device by the name its driver gives ("NVIDIA H100 80GB HBM3")."""
    words = re.split(r"[\s-]+", name.lower())
    joined = {*words, *("".join(pair) for pair in itertools.pairwise(words))}
    return next((device for key, device in DEVICES.items() if key in joined), None)


def device_of(config: PlanConfig) -> Device:
    """What `--device`, `--memory` and `--peak` say.

    Raises:
        ConfigError: an unknown device, or a size that is none.
    """
    if config.device == "here":
        device = _here()
    elif config.device.lower() in DEVICES:
        device = DEVICES[config.device.lower()]
    else:
        raise ConfigError(
            f"--device {config.device} is not known; use {', '.join(DEVICES)} or here, or add --peak and --memory to "
            "one of them."
        )
    if config.memory is not None:
        device = replace(device, memory=_bytes(config.memory))
    return replace(device, peak=config.peak) if config.peak is not None else device


def _here() -> Device:
    device = pick_device("auto")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_as(name)
        return Device(name, known.peak if known else None, total_bytes(device))
    return Device(device.type, None, total_bytes(device), device.type)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ConfigError(f"--memory {text}: write a size such as 80GB or 40GiB.")
    unit: int = (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    return round(float(found[1]) * unit)
