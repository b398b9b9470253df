"""Write a trained model as a plain checkpoint of the kind it came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from minitron_cli.checkpoint.blocks import Produce
from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.writer import Planned, weight_files
from minitron_cli.manifest import write_json
from minitron_cli.models.layerwise import layer_list
from minitron_cli.models.split import is_split, whole
from minitron_cli.runtime.group import Group


def save_model(model: Any, source: Checkpoint, directory: Path, group: Group | None = None) -> None:
    """Save weights in the source's dtype, with its config.json and tokenizer.

    The model's own weights are left rounded to that dtype, so that what is measured next is what was written. Of a
    split model every process must call it; process 0 writes, and none holds more than a layer, or a tensor outside.
    """
    dtype, group = storage_dtype(source), group or Group()
    with torch.no_grad():
        for tensor in model.parameters():
            rounded = tensor.to(dtype)
            tensor.copy_(rounded)
    if is_split(next(model.parameters())):
        _write_split(model, source, dtype, directory, group)
    elif group.main:
        # Stock save_pretrained knows the names on disk; the config on disk stays the source's own.
        types = _types(model, dtype)
        model.save_pretrained(directory, state_dict={name: held.to(types[name]) for name, held in _held(model).items()})
    if group.main:
        copy_companions(source.path, directory)
        write_json(directory / "config.json", dict(source.config))
    group.wait()


def _write_split(model: Any, source: Checkpoint, dtype: torch.dtype, directory: Path, group: Group) -> None:
    pieces, types, files = list(_pieces(model, source)), _types(model, dtype), None
    if group.main:
        shapes = [
            {name: torch.empty(tensor.shape, dtype=types[name], device="meta") for name, tensor in piece.items()}
            for piece in pieces
        ]
        found = [item for piece in shapes for item in revert_weight_conversion(model, piece).items()]
        name_of = {each: name for name, each in TORCH_DTYPES.items()}
        planned = [Planned(name, name_of[tensor.dtype], tuple(tensor.shape)) for name, tensor in found]
        files = weight_files(directory, [(each, _Later()) for each in planned])
    for piece in pieces:
        tensors = {name: whole(tensor.detach(), types[name]) for name, tensor in piece.items()}
        if files is None:
            continue
        for name, tensor in revert_weight_conversion(model, tensors).items():
            files.place(name, tensor.cpu().contiguous().view(torch.uint8).numpy())


def _pieces(model: Any, source: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """What is gathered at once: the tensors of a layer, which the names on disk may join or part, or one outside."""
    held = _held(model)
    for layer in layer_list(model, source.shape)[2]:
        inside = {id(parameter) for parameter in layer.parameters()}
        yield {name: held.pop(name) for name in list(held) if id(held[name]) in inside}
    for name, tensor in held.items():
        yield {name: tensor}


def _held(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones once (conversion to another type would make two of them), and buffers that are saved."""
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    return {**dict(model.named_parameters()), **buffers}


def _types(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is written as. Buffers stay: a routing bias that is rounded chooses other experts."""
    parameters = dict(model.named_parameters())
    return {name: dtype if name in parameters else tensor.dtype for name, tensor in _held(model).items()}


class _Later:
    """The source of a tensor that is placed by hand."""

    def blocks(self) -> Iterator[tuple[int, Produce]]:
        """None."""
        return iter(())


def storage_dtype(source: Checkpoint) -> torch.dtype:
    """The floating type most of the source's bytes are stored in."""
    sizes: dict[str, int] = {}
    for entry in source.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    dtype = TORCH_DTYPES[max(sizes, key=lambda name: sizes[name])]
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
