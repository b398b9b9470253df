"""The ranking that needs no data: weight norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.rotary import per_unit
from minitron_cli.checkpoint.surgery import labels
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Axis
from minitron_cli.importance.layout import Array, Scores, score_shape, scored_axes
from minitron_cli.shape import Shape


def weight_norm_scores(checkpoint: Checkpoint, *, on_tensor: Callable[[], None] = lambda: None) -> Scores:
    """Root of the summed squares of all weights that belong to a unit; one pass over the file, one tensor in memory.

    Norm weights are left out: they scale activations, their size says little of a channel's use.
    """
    shape = checkpoint.shape
    wanted = {axis.name: axis for axis in scored_axes(shape)}
    totals = {name: np.zeros(score_shape(shape, axis)) for name, axis in wanted.items()}
    layer_totals = np.zeros(shape.sizes["layers"])
    for name, (tensor, layer) in checkpoint.declared.items():
        on_tensor()
        if tensor.role in ("norm", "query_norm", "buffer"):
            continue
        squares = checkpoint.read(name).to(torch.float32).square().numpy().astype(np.float64)
        if layer is not None:
            layer_totals[layer] += squares.sum()
        for dim, text in enumerate(tensor.dims):
            energy = squares.sum(axis=tuple(other for other in range(squares.ndim) if other != dim))
            for axis_name in axes(parse(text)) & wanted.keys():
                _add(totals[axis_name], energy, shape, wanted[axis_name], text, layer)
    return {**{name: np.sqrt(total) for name, total in totals.items()}, "layers": np.sqrt(layer_totals)}


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
