"""What `minitron inspect` tells of a checkpoint."""

from __future__ import annotations

from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import INDEX, WEIGHTS, Checkpoint, read_config
from minitron_cli.shape import Shape


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """Shape, parameters, bytes and prunable axes, from config.json; checked against the weights where they are there.

    Raises:
        UserError: not a checkpoint, unknown family, or weights that do not match the config.
    """
    path = resolve(reference, config_only=True)
    shape = Shape.of(read_config(path))
    notes = []
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        checkpoint = Checkpoint(path)
        _ = checkpoint.declared
        nbytes = checkpoint.nbytes
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
        "shape": shape.shown(),
        "bytes": nbytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token(),
        "axes": [] if family.draft else [axis.name for axis in family.axes if axis.prunable],
        "notes": notes,
    }
