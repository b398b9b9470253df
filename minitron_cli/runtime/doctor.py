"""What this machine offers."""

from __future__ import annotations

import os
import shutil
from typing import Any

import psutil
import torch

from minitron_cli import __version__
from minitron_cli.manifest import library_versions


def examine() -> dict[str, Any]:
    """Versions, devices, memory and disk as a flat dictionary."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "minitron": __version__,
        **library_versions(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_bf16": bool(torch.backends.cpu.get_cpu_capability() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "cuda": ", ".join(devices) or "none",
        "mps": torch.backends.mps.is_available(),
    }
