"""The processes of one `torchrun`: who am I, and sums over all of us. Without torchrun there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minitron_cli.runtime.progress import set_quiet


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this one is `rank`; process 0 writes and talks."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def share(self, rows: list[int]) -> list[int]:
        """This process's part of some sequences."""
        return rows[self.rank :: self.size]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over all processes, the same in each."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of every process, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Group]:
    """Join the processes that torchrun started; all of them must come.

    Only sums of statistics travel, from CPU memory, so that gloo serves on every device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    dist.init_process_group("gloo")
    group = Group(dist.get_rank(), size)
    if not group.main:
        set_quiet(True)
    try:
        yield group
    finally:
        dist.destroy_process_group()
