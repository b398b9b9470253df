"""Execute a plan: cut every tensor, write the new config, or hand the tensors over in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.checkpoint.blocks import Array, Choice, Cut, Source
from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.multimodal import WrappedPart
from minitron_cli.checkpoint.reader import Checkpoint, tensor_of
from minitron_cli.checkpoint.surgery import Indices, first_terms, positions, softmax_fold
from minitron_cli.checkpoint.writer import SHARD_BYTES, Planned, WeightFiles, weight_files
from minitron_cli.errors import InputError
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Tensor
from minitron_cli.manifest import write_json
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.shape import Shape


def check_plan(plan: PrunePlan, shape: Shape) -> None:
    """A plan belongs to a checkpoint of the sizes it was made for, and names units that it has, in their order.

    Raises:
        InputError: it was made for another shape, or was edited into something that cannot be cut.
    """
    if plan.family != shape.family.name or plan.sizes_before != dict(shape.sizes):
        raise InputError("The plan was made for a checkpoint of another shape; make it again for this one.")
    for axis, units in {**plan.keep, "layers": plan.layers}.items():
        before, after = shape.sizes.get(axis, 0), plan.sizes.get(axis, 0)
        for chosen in _innermost(units):
            whole_numbers = all(type(unit) is int for unit in chosen)
            if not whole_numbers or len(chosen) != after or sorted({*chosen} & {*range(before)}) != chosen:
                raise InputError(
                    f"The plan must keep {after} units of {axis}, ascending, each once and below {before}; make it "
                    "again with `minitron prune --dry-run --json`."
                )


def _innermost(units: Any) -> Iterator[list[Any]]:
    """The lists of unit numbers in a possibly nested choice."""
    if isinstance(units, list) and units and all(isinstance(each, list) for each in units):
        for each in units:
            yield from _innermost(each)
    else:
        yield units if isinstance(units, list) else [units]


def cut_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Cut]]:
    """Every tensor of the result: what it will be, and how it is cut; called, the cut gives the tensor in memory."""
    family = checkpoint.shape.family
    new = Shape.of(planned_config(checkpoint.shape, plan))
    declared = checkpoint.declared
    kept_layers = set(plan.layers)
    # Both tables list the same patterns in the same order, so that old and new names pair up one to one.
    old_items = [item for item in family.expected(checkpoint.config) if item[2] is None or item[2] in kept_layers]
    for (old_name, tensor, layer), (new_name, new_tensor, _) in zip(
        old_items, family.expected(new.config), strict=True
    ):
        assert tensor == new_tensor
        if old_name in declared:
            entry = checkpoint.entries[old_name]
            planned = Planned(new_name, entry.dtype, family.tensor_shape(tensor, new.sizes))
            yield planned, Cut(entry, partial(_choice, checkpoint.shape, plan, tensor, layer, entry.dtype))


def written_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Source]]:
    """Every tensor that is written: the cut ones, and around a text part cut in place all others as they are."""
    tensors = cut_tensors(checkpoint, plan)
    return checkpoint.put_back(tensors) if isinstance(checkpoint, WrappedPart) else tensors


def _choice(shape: Shape, plan: PrunePlan, tensor: Tensor, layer: int | None, dtype: str) -> Choice:
    within = {axis.name: axis.within for axis in shape.family.axes if axis.within}
    kept = plan.kept(layer)
    selections = [positions(parse(text), shape.sizes, kept, within) for text in tensor.dims]
    old, new = shape.sizes.get("head_dim"), plan.sizes.get("head_dim")
    if tensor.role not in ("query", "query_norm") or not old or not new or old == new:
        return Choice(selections)
    norm = tensor.norm or shape.family.norm
    offset = norm.offset if tensor.role == "query_norm" else 0.0
    scales = [_scale(shape, text, chosen, old, new) for text, chosen in zip(tensor.dims, selections, strict=True)]
    return Choice(selections, partial(_folded, scales, offset, dtype))


def _scale(shape: Shape, text: str, chosen: Indices, old: int, new: int) -> npt.NDArray[np.float32]:
    """Factor of every kept position of a dimension: (kept,)."""
    expression = parse(text)
    if "head_dim" not in axes(expression):
        return np.ones(len(chosen), np.float32)
    return np.where(first_terms(expression, shape.sizes)[chosen], softmax_fold(old, new), 1.0).astype(np.float32)


def _folded(
    scales: list[npt.NDArray[np.float32]], offset: float, dtype: str, values: Array, at: tuple[slice, ...]
) -> Array:
    """Multiply the queries among the kept values; of a norm that applies w + offset, what it applies."""
    import torch

    scale = torch.ones((), dtype=torch.float32)
    for dim, (along, part) in enumerate(zip(scales, at, strict=True)):
        scale = scale * torch.from_numpy(along[part]).view([-1 if each == dim else 1 for each in range(len(at))])
    kept = tensor_of(values, dtype, values.shape)
    folded = kept.to(torch.float32).add_(offset).mul_(scale).sub_(offset).to(kept.dtype)
    return folded.view(torch.uint8).numpy().view(values.dtype)


def create_pruned(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    tensors: Sequence[tuple[Planned, Source]],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> WeightFiles:
    """The pruned checkpoint in an existing directory, whole but for the values in its weight files, still to be filled.

    `tensors` are those of `written_tensors`.
    """
    config = planned_config(checkpoint.shape, plan)
    if isinstance(checkpoint, WrappedPart):
        config = checkpoint.put_back_config(config)
    write_json(directory / "config.json", config)
    write_json(directory / "plan.json", plan.to_json())
    copy_companions(checkpoint.path, directory)
    return weight_files(directory, tensors, shard_bytes=shard_bytes)
