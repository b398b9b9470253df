"""What `minitron inspect` tells of a checkpoint."""

from __future__ import annotations

from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.multimodal import TextPart, fixed_in_place, is_wrapped, open_checkpoint, open_shape
from minitron_cli.checkpoint.reader import INDEX, WEIGHTS, quantisation


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """Shape, parameters, bytes and prunable axes, from config.json; checked against the weights where they are there.

    Raises:
        UserError: not a checkpoint, unknown family, or weights that do not match the config.
    """
    path = resolve(reference, config_only=True)
    shape = open_shape(path)
    axes = (
        []
        if shape.family.draft
        else [axis.name for axis in shape.family.axes if axis.prunable and axis.name not in shape.absent]
    )
    notes = []
    if is_wrapped(path):
        notes.append("the text part of a multimodal checkpoint; `prune --text-only` extracts it and cuts every axis")
        axes = [axis for axis in axes if axis not in fixed_in_place(shape)]
    method = quantisation(shape.config)
    if method is not None:
        notes.append(f"quantised ({method}): counted as unpacked, from config.json; cuts need the bf16 checkpoint")
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        checkpoint = open_checkpoint(path)
        if method is None:
            _ = checkpoint.declared
        shape, nbytes = checkpoint.shape, checkpoint.nbytes
        if isinstance(checkpoint, TextPart):
            notes.append(f"{checkpoint.params_outside:,} parameters lie outside the text part")
        notes += [f"{count} tensors: {notice}" for notice, count in checkpoint.dropped().items()]
    else:
        nbytes = shape.params * shape.dtype_bytes()
        notes.append("from config.json alone; no weights here")
    family = shape.family
    return {
        "path": reference,
        "family": family.name,
        "params": shape.params,
        "params_non_embedding": shape.params_non_embedding,
        "params_active": shape.params_active,
        "experts_per_token": 0 if "experts" in shape.absent else shape.experts_per_token,
        "shape": shape.shown(),
        "bytes": nbytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token(),
        "state_bytes_per_sequence": shape.state_bytes(),
        "axes": axes,
        "notes": notes,
    }
