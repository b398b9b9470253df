"""The ranking that needs no data: weight norms."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.rotary import per_unit
from minitron_cli.checkpoint.surgery import labels
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Axis
from minitron_cli.importance.layout import Array, Scores, score_shape, scored_axes
from minitron_cli.shape import Shape

BLOCK_ELEMENTS = 1 << 24
"""Elements squared at once: 64 MiB in fp32, however large the embedding."""


def weight_norm_scores(
    checkpoint: Checkpoint, *, only: Collection[str] | None = None, on_tensor: Callable[[], None] = lambda: None
) -> Scores:
    """Root of the summed squares of all weights that belong to a unit; one pass over the file, one tensor in memory.

    Norm weights are left out: they scale activations, their size says little of a channel's use.

    Args:
        only: score these axes alone, and read no tensor that has none of them.
    """
    shape = checkpoint.shape
    wanted = {axis.name: axis for axis in scored_axes(shape) if only is None or axis.name in only}
    totals = {name: np.zeros(score_shape(shape, axis)) for name, axis in wanted.items()}
    layer_totals = np.zeros(shape.sizes["layers"])
    for name, (tensor, layer) in checkpoint.declared.items():
        on_tensor()
        named = [axes(parse(text)) & wanted.keys() for text in tensor.dims]
        if tensor.role in ("norm", "query_norm", "buffer") or not (only is None or any(named)):
            continue
        energies = squared_sums(checkpoint.read(name))
        if layer is not None:
            layer_totals[layer] += energies[0].sum()
        for energy, text, found in zip(energies, tensor.dims, named, strict=True):
            for axis_name in found:
                _add(totals[axis_name], energy, shape, wanted[axis_name], text, layer)
    scores = {name: np.sqrt(total) for name, total in totals.items()}
    return scores if only is not None else {**scores, "layers": np.sqrt(layer_totals)}


def squared_sums(tensor: torch.Tensor) -> list[Array]:
    """For each dimension, the squares summed over all others: fp32 squares, fp64 sums, a block of rows at a time."""
    rows = max(1, BLOCK_ELEMENTS // max(tensor[0].numel(), 1))
    sums = [torch.zeros(length, dtype=torch.float64) for length in tensor.shape]
    for start in range(0, len(tensor), rows):
        squares = tensor[start : start + rows].float().square()
        for dim, total in enumerate(sums):
            others = [other for other in range(squares.ndim) if other != dim]
            part = squares.sum(others, dtype=torch.float64) if others else squares.double()
            if dim == 0:
                total[start : start + rows] = part
            else:
                total += part
    return [total.numpy() for total in sums]


def _add(total: Array, energy: Array, shape: Shape, axis: Axis, text: str, layer: int | None) -> None:
    """Add a dimension's energy to the units of one axis."""
    unit = labels(parse(text), shape.sizes, axis.name, axis.within)
    used = unit >= 0
    units = shape.sizes[axis.name] * (shape.sizes[axis.within] if axis.within else 1)
    summed = np.bincount(unit[used], weights=energy[used], minlength=units)
    rotary = shape.family.rotary
    if rotary is not None and axis.name == rotary.axis:
        if layer is not None:
            total[layer] += per_unit(rotary, shape.config, summed)
        return
    target = total[layer] if axis.per_layer and layer is not None else total
    target += summed.reshape(target.shape)
