"""Execute a plan: cut every tensor, write the new config, or hand the tensors over in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.multimodal import WrappedPart
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.surgery import Indices, cut, first_terms, positions, softmax_fold
from minitron_cli.checkpoint.writer import SHARD_BYTES, Planned, write_weights
from minitron_cli.errors import InputError
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Tensor
from minitron_cli.manifest import write_json
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.shape import Shape


def check_plan(plan: PrunePlan, shape: Shape) -> None:
    """A plan belongs to a checkpoint of the sizes it was made for.

    Raises:
        InputError: it was made for another shape.
    """
    if plan.family != shape.family.name or plan.sizes_before != dict(shape.sizes):
        raise InputError("The plan was made for a checkpoint of another shape; make it again for this one.")


def cut_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Callable[[], torch.Tensor]]]:
    """Every tensor of the result: what it will be, and a function that reads and cuts it when called."""
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
            planned = Planned(new_name, checkpoint.entries[old_name].dtype, family.tensor_shape(tensor, new.sizes))
            yield planned, _reader(checkpoint, plan, old_name, tensor, layer)


def written_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Callable[[], torch.Tensor]]]:
    """Every tensor that is written: the cut ones, and around a text part cut in place all others as they are."""
    tensors = cut_tensors(checkpoint, plan)
    return checkpoint.put_back(tensors) if isinstance(checkpoint, WrappedPart) else tensors


def _reader(
    checkpoint: Checkpoint, plan: PrunePlan, name: str, tensor: Tensor, layer: int | None
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        shape = checkpoint.shape
        within = {axis.name: axis.within for axis in shape.family.axes if axis.within}
        kept = plan.kept(layer)
        selections = [positions(parse(text), shape.sizes, kept, within) for text in tensor.dims]
        result = cut(checkpoint.read(name), selections)
        old, new = shape.sizes.get("head_dim"), plan.sizes.get("head_dim")
        if tensor.role in ("query", "query_norm") and old and new and old != new:
            result = _folded(checkpoint, tensor, result, selections, softmax_fold(old, new))
        return result

    return read


def _folded(
    checkpoint: Checkpoint, tensor: Tensor, cut_tensor: torch.Tensor, selections: list[Indices], factor: float
) -> torch.Tensor:
    """Multiply the queries of a cut tensor; of a norm that applies w + offset, what it applies."""
    scale = torch.ones((), dtype=torch.float32)
    for dim, text in enumerate(tensor.dims):
        if "head_dim" in axes(parse(text)):
            queries = first_terms(parse(text), checkpoint.shape.sizes)[selections[dim]]
            along = torch.from_numpy(np.where(queries, factor, 1.0)).float()
            scale = scale * along.view([-1 if each == dim else 1 for each in range(cut_tensor.ndim)])
    norm = tensor.norm or checkpoint.shape.family.norm
    offset = norm.offset if tensor.role == "query_norm" else 0.0
    return ((cut_tensor.to(torch.float32) + offset) * scale - offset).to(cut_tensor.dtype)


def write_pruned(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the pruned checkpoint into an existing directory: weights, config, tokenizer and plan."""
    tensors = {planned.name: (planned, read) for planned, read in written_tensors(checkpoint, plan)}
    planned = [item for item, _ in tensors.values()]
    write_weights(directory, planned, lambda name: tensors[name][1](), shard_bytes=shard_bytes, on_bytes=on_bytes)
    config = planned_config(checkpoint.shape, plan)
    if isinstance(checkpoint, WrappedPart):
        config = checkpoint.put_back_config(config)
    write_json(directory / "config.json", config)
    write_json(directory / "plan.json", plan.to_json())
    copy_companions(checkpoint.path, directory)


def pruned_bytes(checkpoint: Checkpoint, plan: PrunePlan) -> int:
    """Bytes of the pruned weights."""
    return sum(planned.nbytes for planned, _ in written_tensors(checkpoint, plan))
