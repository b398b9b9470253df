"""The processes of one `torchrun`: who am I, sums over all of us, and how we end together. Without it there is one.

Every process runs the same program and meets the others in collectives. A process that fails leaves; the others notice
when the next collective fails, or are told to stop by torchrun, which watches all of them. Whoever leaves first says
why (`_Ending`), so that one sentence is read, not one per process.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minitron_cli.errors import MinitronError, RunError
from minitron_cli.runtime.launch import processes, unlaunched
from minitron_cli.runtime.progress import set_quiet

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long a collective waits for a process that lives but does not come; one that died is noticed at once."""
POLL_SECONDS = 0.05


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
        return rows[self.part]

    @property
    def part(self) -> slice:
        """The same as a slice: every `size`-th, so that the part of a step depends on the step alone."""
        return slice(self.rank, None, self.size)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over all processes, the same in each."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_of(self, *numbers: float) -> list[float]:
        """Sums of numbers over all processes, in fp64."""
        return list(numbers) if self.size == 1 else self.total(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum_of(float(flag))[0] > 0

    def least(self, number: int) -> int:
        """The least of all processes' numbers."""
        return min(int(each) for each in self.gathered(torch.tensor([number])))

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A CPU tensor of every process, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def from_main(self, value: T) -> T:
        """What process 0 has."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def joined(self, own: torch.Tensor) -> torch.Tensor:
        """All rows, from each process's `part` of them: equally many in each."""
        if self.size == 1:
            return own
        parts = self.gathered(own.cpu())
        return torch.stack(parts, 1).flatten(0, 1).to(own.device)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the block, then all others do."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def alone(self, work: Callable[[], Any]) -> None:
        """Process 0 works, for however long and as if it were the only one; all others wait."""
        global _group
        if self.size == 1:
            work()
            return
        if self.main:
            _group = Group()
            try:
                with unlaunched():
                    work()
            finally:
                _group = self
        # No collective: it would give up after PATIENCE.
        assert _ending is not None
        key = f"alone-{next(_errands)}"
        if self.main:
            _ending.store.set(key, "done")
        while not _ending.store.check([key]):
            time.sleep(POLL_SECONDS)


class _Ending:
    """The first process that leaves with an error says why; the others leave in silence."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def first(self) -> bool:
        """Whether nobody has left with an error yet."""
        try:
            return bool(self.store.add("ending", 1) == 1)
        except Exception:  # the store's host is gone: nobody else can say anything either
            return True


_group = Group()
_ending: _Ending | None = None
_errands = itertools.count()


@contextmanager
def process_group() -> Iterator[Group]:
    """Join the processes that torchrun started; all of them must come. Inside such a block, that block's group.

    CPU tensors travel by gloo, those of CUDA devices by NCCL.

    Raises:
        RunError: another process was lost.
        SystemExit: another process has said why all of them end.
    """
    global _group, _ending
    if processes() == 1 or _group.size > 1:
        yield _group
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(PATIENCE)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _ending = _Ending(PrefixStore(f"minitron-{attempt}", store))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _group = Group(rank, size)
    if not _group.main:
        set_quiet(True)
    try:
        yield _group
    except BaseException as error:
        _leave(error, _ending)
        raise
    else:
        dist.destroy_process_group()
    finally:
        _group, _ending = Group(), None


def _leave(error: BaseException, ending: _Ending) -> None:
    """Say nothing where another process has said why; a lost process is told in a sentence of its own.

    The connections stay open until this process ends: others must not take them for lost before it has spoken.
    """
    if isinstance(error, SystemExit):
        return
    # A signal comes to all processes; process 0 tells it.
    signalled = not isinstance(error, Exception)
    if (signalled and not _group.main) or not ending.first():
        raise SystemExit(error.exit_code if isinstance(error, MinitronError) else 1) from None
    if isinstance(error, MinitronError):
        error.for_all = True
    if _is_loss(error):
        raise RunError(
            "Another process of this run was lost (killed, out of memory, or its machine is gone), so all stop; "
            "the same command continues from the last checkpoint."
        ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed because a process is not there any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
