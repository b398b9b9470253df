"""How much memory there is, how much was used, and refusing early what cannot fit."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from minitron_cli.errors import ResourceError
from minitron_cli.runtime.launch import local_processes

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_freed() -> None:
    """Hand freed memory back to the system (glibc; elsewhere nothing happens).

    Freed blocks of weights and activations stay on glibc's heap, where small ones between them pin them down: a process
    that works through layer after layer would grow with the number of layers.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory a new allocation could take on the device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    # Processes of one torchrun share a machine's memory.
    return min(int(psutil.virtual_memory().available), _cgroup_available()) // local_processes()


def total_bytes(device: torch.device) -> int:
    """Memory of the device, or of a process's share of the machine."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // local_processes()


def _cgroup_available() -> int:
    """What a container's own limit leaves (cgroup v2), or infinity."""
    try:
        limit, used, listing = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        # Page cache is counted as used and is given back on demand.
        stat = dict(line.split() for line in listing.splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    if limit.strip() == "max":
        return sys.maxsize
    return max(int(limit) - int(used) + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)), 0)


def require_memory(parts: dict[str, int], device: torch.device, advice: str) -> None:
    """Refuse before loading what cannot fit.

    Args:
        parts: what will be held, in bytes.
        advice: options that would help.

    Raises:
        ResourceError: the sum exceeds what is available.
    """
    needed, free = sum(parts.values()), available_bytes(device)
    if needed > free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
        raise ResourceError(
            f"This needs about {needed / 1e9:.1f} GB on {device} ({listed} GB) and {free / 1e9:.1f} GB is free; "
            f"{advice}."
        )
