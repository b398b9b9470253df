"""The ranking that needs no data: weight norms."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from minitron_cli.checkpoint.blocks import Workspace, read_region, regions
from minitron_cli.checkpoint.reader import Checkpoint, Entry, tensor_of
from minitron_cli.checkpoint.rotary import per_unit
from minitron_cli.checkpoint.surgery import labels
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Axis, Tensor
from minitron_cli.importance.layout import Array, Scores, score_shape, scored_axes
from minitron_cli.shape import Shape, expert_of

BLOCK_BYTES = 4 << 20
"""Bytes squared at once; the squares in fp64 take four times as much beside them for bf16."""
WORKERS = 2
"""Tensors in flight: one is read while another is squared."""


class Normed(NamedTuple):
    """A tensor that the pass reads, or one expert's part of it: where it is, what it is, and to what it belongs."""

    entry: Entry
    tensor: Tensor
    layer: int | None
    expert: int | None

    @property
    def axes(self) -> frozenset[str]:
        """Axes whose units it has, or is one of."""
        own = frozenset({"experts"} if self.expert is not None else ())
        return own.union(*(axes(parse(text)) for text in self.tensor.dims))


def normed_tensors(checkpoint: Checkpoint, only: Collection[str] | None = None) -> list[Normed]:
    """What the pass reads.

    Norm weights are left out: they scale activations, their size says little of a channel's use.

    Args:
        only: axes that a tensor must have one of.
    """
    found: list[Normed] = []
    for name, (tensor, layer) in checkpoint.declared.items():
        entry, part = checkpoint.entries[name], checkpoint.shape.family.taken_apart(tensor)
        if tensor.role in ("norm", "query_norm", "buffer"):
            continue
        if part is None:
            found.append(Normed(entry, tensor, layer, expert_of(name)))
        else:
            found += [Normed(entry.part(number), part, layer, number) for number in range(entry.shape[0])]
    return [each for each in found if only is None or each.axes & set(only)]


def weight_norm_scores(
    checkpoint: Checkpoint, *, only: Collection[str] | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Scores:
    """Root of the summed squares of all weights that belong to a unit; one pass over the file, a few blocks in memory.

    Args:
        only: score these axes alone, and read no tensor that has none of them.
        on_bytes: hears of progress.

    Raises:
        CheckpointError: a file ended early.
    """
    shape = checkpoint.shape
    wanted = {axis.name: axis for axis in scored_axes(shape) if only is None or axis.name in only}
    totals = {name: np.zeros(score_shape(shape, axis)) for name, axis in wanted.items()}
    layer_totals = np.zeros(shape.sizes["layers"])
    tensors = normed_tensors(checkpoint, None if only is None else wanted)
    with ThreadPoolExecutor(WORKERS) as pool:
        # In the order of the table, whichever is done first: sums are the same every time.
        found = pool.map(squared_sums, [each.entry for each in tensors])
        for each, energies in zip(tensors, found, strict=True):
            if each.layer is not None:
                layer_totals[each.layer] += energies[0].sum()
                if each.expert is not None and "experts" in totals:
                    totals["experts"][each.layer, each.expert] += energies[0].sum()
            for energy, text in zip(energies, each.tensor.dims, strict=True):
                for axis_name in axes(parse(text)) & wanted.keys():
                    _add(totals[axis_name], energy, shape, wanted[axis_name], text, each)
            on_bytes(each.entry.nbytes)
    scores = {name: np.sqrt(total) for name, total in totals.items()}
    return scores if only is not None else {**scores, "layers": np.sqrt(layer_totals)}


def squared_sums(entry: Entry) -> list[Array]:
    """For each dimension, the squares summed over all others, in fp64, a block at a time."""
    sums = [np.zeros(length) for length in entry.shape]
    workspace = Workspace()
    for region in regions(entry, [np.arange(length) for length in entry.shape], BLOCK_BYTES):
        stored = read_region(entry, region, workspace)
        squares = tensor_of(stored, entry.dtype, stored.shape).to(torch.float64).square_()
        for dim, (total, part) in enumerate(zip(sums, region.at, strict=True)):
            others = [other for other in range(squares.ndim) if other != dim]
            total[part] += (squares.sum(others) if others else squares).numpy()
    return sums


def _add(total: Array, energy: Array, shape: Shape, axis: Axis, text: str, normed: Normed) -> None:
    """Add a dimension's energy to the units of one axis."""
    layer, outer = normed.layer, axis.within
    if outer == "experts" and normed.expert is not None:
        total, outer = total[:, normed.expert], ""
    unit = labels(parse(text), shape.sizes, axis.name, outer)
    used = unit >= 0
    units = shape.sizes[axis.name] * (shape.sizes[outer] if outer else 1)
    summed = np.bincount(unit[used], weights=energy[used], minlength=units)
    rotary = shape.family.rotary
    if rotary is not None and axis.name == rotary.axis:
        if layer is not None:
            total[layer] += per_unit(rotary, shape.config, summed)
        return
    target = total[layer] if axis.per_layer and layer is not None else total
    target += summed.reshape(target.shape)
