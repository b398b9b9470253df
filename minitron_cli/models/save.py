"""Write a trained model as a plain checkpoint of the kind it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.manifest import write_json


def save_model(model: Any, source: Checkpoint, directory: Path) -> None:
    """Save weights in the source's dtype, with its config.json and tokenizer.

    The model's own weights are left rounded to that dtype, so that what is measured next is what was written.
    """
    dtype = storage_dtype(source)
    with torch.no_grad():
        for tensor in model.parameters():
            rounded = tensor.to(dtype)
            tensor.copy_(rounded)
    # Stock save_pretrained knows tied weights and the names on disk; the config on disk stays the source's own.
    buffers = {name for name, _ in model.named_buffers()}
    # Buffers stay as they are: a routing bias that is rounded chooses other experts.
    state = {name: tensor if name in buffers else tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    copy_companions(source.path, directory)
    write_json(directory / "config.json", dict(source.config))


def storage_dtype(source: Checkpoint) -> torch.dtype:
    """The floating type most of the source's bytes are stored in."""
    sizes: dict[str, int] = {}
    for entry in source.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    dtype = TORCH_DTYPES[max(sizes, key=lambda name: sizes[name])]
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
