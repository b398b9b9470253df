"""Device and compute dtype from the words users type."""

from __future__ import annotations

import os

import torch

from minitron_cli.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA, else MPS, else CPU), or any torch device string.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA device is visible here; use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: no MPS device is visible here; use --device cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA, fp32 elsewhere (bf16 matmul on a CPU without native support is 100 times slower).

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name}: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def wide_device(device: torch.device) -> torch.device:
    """Where fp64 sums of what a device computes are kept: there, unless it has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device
