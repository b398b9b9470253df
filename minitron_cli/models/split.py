"""Tensors of which each process may hold a part: torch's DTensors, or ordinary ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from minitron_cli.runtime.group import Group


def is_split(tensor: Tensor | None) -> bool:
    """Whether a process holds only a part of it."""
    return isinstance(tensor, DTensor)


def part_of(tensor: Any) -> Tensor:
    """What this process holds of it, in the same memory."""
    part: Tensor = tensor.to_local() if is_split(tensor) else tensor
    return part


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of it, in every process, on the device that computes; without gradients where it is split."""
    dtype = dtype or tensor.dtype
    if not isinstance(tensor, DTensor):
        return tensor.to(dtype)
    mesh = tensor.device_mesh
    part = part_of(tensor.detach()).to(mesh.device_type, dtype)
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    ).full_tensor()


@torch.no_grad()
def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add the sum of all processes' gradients, each as large as the whole parameter, to the parts of `.grad`."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    total = DTensor.from_local(gradient, mesh, [Partial()] * mesh.ndim, run_check=False)
    part = total.redistribute(placements=parameter.placements).to_local()
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    mine = part_of(parameter.grad)
    mine += part.to(mine)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float, group: Group) -> float:
    """As torch's `clip_grad_norm_`, of gradients some of which are split; returns the norm before."""
    graded = [(parameter, part_of(parameter.grad)) for parameter in parameters if parameter.grad is not None]
    split = [part for parameter, part in graded if is_split(parameter)]
    rest = [part for parameter, part in graded if not is_split(parameter)]
    copies = next((_copies(parameter) for parameter, _ in graded if is_split(parameter)), 1)
    square = float(torch.nn.utils.get_total_norm(split)) ** 2 if split else 0.0
    (everywhere,) = group.sum_of(square)
    norm = math.sqrt(everywhere / copies + (float(torch.nn.utils.get_total_norm(rest)) ** 2 if rest else 0.0))
    for _, part in graded:
        part *= min(1.0, limit / (norm + 1e-6))
    return norm


def _copies(parameter: Any) -> int:
    """How many processes hold each part."""
    return int(parameter.device_mesh.size(0)) if parameter.device_mesh.ndim > 1 else 1


def device_of(model: Any) -> torch.device:
    """Where a model computes; parts of a split one may lie elsewhere."""
    first: Any = next(model.parameters())
    return torch.device(first.device_mesh.device_type) if is_split(first) else first.device


def units_of(model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> list[Any]:
    """The smallest units, gathered as one, that some modules of a split model lie in; none of an ordinary model."""
    if not is_split(next(model.parameters())):
        return []
    from torch.distributed.fsdp import FSDPModule

    wanted, found = set(modules), []
    for unit in reversed([each for each in model.modules() if isinstance(each, FSDPModule)]):  # inner ones first
        inside = wanted.intersection(unit.modules())
        if inside:
            found.append(unit)
            wanted -= inside
    return found
