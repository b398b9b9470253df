"""Execute a plan: cut every tensor, write the new config, or hand the tensors over in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.blocks import Cut, Source, Stack
from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.multimodal import WrappedPart
from minitron_cli.checkpoint.reader import Checkpoint, Entry
from minitron_cli.checkpoint.writer import SHARD_BYTES, Planned, WeightFiles, weight_files
from minitron_cli.errors import InputError
from minitron_cli.manifest import write_json
from minitron_cli.prune.edit import Edit
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.prune.residual import untying
from minitron_cli.prune.rotate import Norm, Rotated, Rotation
from minitron_cli.shape import Shape, expert_of

Made = Cut | Stack | Rotated | Norm


def check_plan(plan: PrunePlan, shape: Shape) -> None:
    """A plan belongs to a checkpoint of the sizes it was made for, and names units that it has, in their order.

    Raises:
        InputError: it was made for another shape, or was edited into something that cannot be cut.
    """
    if plan.family != shape.family.name or plan.sizes_before != dict(shape.sizes):
        raise InputError("The plan was made for a checkpoint of another shape; make it again for this one.")
    evenly = {axis.name: axis.evenly for axis in shape.family.axes}
    for axis, units in {**plan.keep, "layers": plan.layers}.items():
        before, after = shape.sizes.get(axis, 0), plan.sizes.get(axis, 0)
        if units and isinstance(units[0], list):
            having = shape.layers_with(axis)
            units = [each for layer, each in zip(plan.layers, units, strict=False) if each or layer in having]
            if not units:
                continue
        for chosen in _innermost(units):
            whole_numbers = all(type(unit) is int for unit in chosen)
            if not whole_numbers or len(chosen) != after or sorted({*chosen} & {*range(before)}) != chosen:
                raise InputError(
                    f"The plan must keep {after} units of {axis}, ascending, each once and below {before}; make it "
                    "again with `minitron prune --dry-run --json`."
                )
            blocks = shape.sizes.get(evenly.get(axis, ""), 1)
            if len({sum(unit // (before // blocks) == block for unit in chosen) for block in range(blocks)}) > 1:
                raise InputError(
                    f"The plan must keep equally many units of {axis} in each of its {blocks} groups; make it again "
                    "with `minitron prune --dry-run --json`."
                )


def _innermost(units: Any) -> Iterator[list[Any]]:
    """The lists of unit numbers in a possibly nested choice."""
    if isinstance(units, list) and units and all(isinstance(each, list) for each in units):
        for each in units:
            yield from _innermost(each)
    else:
        yield units if isinstance(units, list) else [units]


def cut_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Made]]:
    """Every tensor of the result: what it will be, and how it is made; called, that gives the tensor in memory."""
    shape, family, declared = checkpoint.shape, checkpoint.shape.family, checkpoint.declared
    new = Shape.of(planned_config(shape, plan))
    # A head that stops to be the embedding table is made from that table.
    old = {**checkpoint.config, **(untying(shape) if plan.untie else {})}
    rotation = Rotation.of(checkpoint, plan) if plan.rotate else None
    # Both tables list the same patterns in the same order, so that old and new names pair up one to one.
    old_items = [(name, tensor, layer) for name, tensor, layer in family.expected(old) if _stays(plan, name, layer)]
    for (old_name, tensor, layer), (new_name, new_tensor, _) in zip(
        old_items, family.expected(new.config), strict=True
    ):
        assert tensor == new_tensor
        source = old_name if old_name in declared or rotation is None else family.tied.get(old_name, old_name)
        if source in declared:
            entry = checkpoint.entries[source]
            planned = Planned(new_name, entry.dtype, family.tensor_shape(tensor, new.sizes))
            edit = Edit(shape, plan, old_name, tensor, layer, entry.dtype, expert_of(old_name))
            rotated = rotation.of_tensor(entry, edit) if rotation is not None else None
            yield planned, rotated or _stacked(entry, edit, planned) or Cut(entry, edit.choice, planned.shape)


def _stays(plan: PrunePlan, name: str, layer: int | None) -> bool:
    """Whether something of a tensor stays: it is not one of a removed layer or expert."""
    if layer is not None and layer not in plan.layers:
        return False
    expert = expert_of(name)
    return expert is None or "experts" not in plan.keep or expert in plan.kept(layer)["experts"]


def _stacked(entry: Entry, edit: Edit, planned: Planned) -> Stack | None:
    """How a tensor that holds all experts is cut, where each of them keeps its own units; None for others."""
    part = edit.shape.family.taken_apart(edit.tensor)
    if part is None:
        return None
    experts = edit.plan.kept(edit.layer).get("experts", range(edit.shape["experts"]))
    cuts = [
        Cut(entry.part(expert), replace(edit, tensor=part, expert=expert).choice, planned.shape[1:])
        for expert in map(int, experts)
    ]
    return Stack(tuple(cuts), planned.nbytes // len(cuts))


def written_tensors(checkpoint: Checkpoint, plan: PrunePlan) -> Iterator[tuple[Planned, Source]]:
    """Every tensor that is written: the cut ones, and around a text part cut in place all others as they are."""
    tensors = cut_tensors(checkpoint, plan)
    return checkpoint.put_back(tensors) if isinstance(checkpoint, WrappedPart) else tensors


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
