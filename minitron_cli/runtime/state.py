"""Resumable state: tensors and numbers in one safetensors file that is replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_cli.manifest import sync_directory


def save_state(path: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Replace `path` by a new state; a reader sees the old one or the new one, whatever happens in between."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        temporary,
        {"values": json.dumps(values)},
    )
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The last saved state, every tensor in memory of its own; None if there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        values = json.loads(file.metadata()["values"])
    return tensors, values
