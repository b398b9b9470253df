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
    """Versions, devices, memory and disk, and `advice`, a list of sentences."""
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
        "hub_token": token_found(),
        "advice": advice(len(devices)),
    }


def token_found() -> str:
    """Whether gated checkpoints and uploads can work; never the token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE)"
    return "found" if get_token() else "none"


def advice(gpus: int) -> list[str]:
    """What would make work here faster or possible."""
    found = []
    free, disk = psutil.virtual_memory().available, shutil.disk_usage(".").free
    if not gpus and not torch.backends.mps.is_available():
        found.append(
            "no GPU: cutting and scoring run well on the CPU; distil models of a billion parameters elsewhere."
        )
    if free < 4 << 30:
        found.append(f"{free / 1e9:.1f} GB of memory are free: importance --stream keeps one layer in memory.")
    if disk < 20 << 30:
        found.append(
            f"{disk / 1e9:.1f} GB of disk are free here: a checkpoint needs 2 bytes per parameter, training 12."
        )
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < cores:
        found.append(f"torch uses {threads} of {cores} cores: set OMP_NUM_THREADS={cores} unless that is meant.")
    return found
