"""Tensors as blocks: regions of a file small enough to hold, each read, cut and placed on its own.

Values are moved as unsigned integers of their width, so that every type is copied bit by bit, and nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from minitron_cli.checkpoint.reader import Entry, read_into, tensor_of
from minitron_cli.checkpoint.surgery import Indices, cut
from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import BYTES

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

BLOCK_BYTES = 16 << 20
"""Bytes read at once. A worker holds this up to three times (read, rows taken, columns taken)."""

GAP_BYTES = 256 << 10
"""Dropped rows are skipped from this size on: below it a second request costs more than the bytes between."""

_BEYOND_FINITE = {
    "F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C,
}  # fmt: skip
"""Bits of the smallest positive value that is not finite; all above it are not finite either."""


class Workspace:
    """Memory that one worker uses again for every block: fresh pages cost as much as the copy itself."""

    def __init__(self) -> None:
        self._buffers = [np.empty(0, np.uint8)] * 3

    def array(self, slot: int, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An array on one of the three buffers; it is valid until the slot is asked for again."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        if len(self._buffers[slot]) < nbytes:
            self._buffers[slot] = np.empty(max(nbytes, min(BLOCK_BYTES, 2 * nbytes)), np.uint8)
        return self._buffers[slot][:nbytes].view(dtype).reshape(shape)


Produce = Callable[[Workspace], Array]
"""Makes the values of one block, in memory of the workspace or elsewhere."""


class Source(Protocol):
    """Where the values of a tensor come from."""

    def blocks(self) -> Iterator[tuple[int, Produce]]:
        """Byte position within the tensor, and what makes the values from there on."""
        ...


@dataclass(frozen=True)
class Region:
    """Part of a tensor on disk: one index of each leading dimension, a run of one dimension, all of the further ones.

    start   byte position in the file
    shape   of the part as stored
    kept    positions kept along each dimension of the part, ascending
    at      where they go along each dimension of the result
    """

    start: int
    shape: tuple[int, ...]
    kept: tuple[Indices, ...]
    at: tuple[slice, ...]


def regions(entry: Entry, kept: Sequence[Indices], limit: int) -> Iterator[Region]:
    """The parts of a tensor of at most `limit` bytes (at least one element) of which anything is kept, in order."""
    shape, itemsize = entry.shape, BYTES[entry.dtype]
    if not shape:
        yield Region(entry.offsets[0], (), (), ())
    if not shape or not all(map(len, kept)):
        return
    # Bytes that one step along each dimension passes over.
    strides = [prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    split = next((dim for dim, stride in enumerate(strides) if stride <= limit), len(shape) - 1)
    step = max(1, limit // max(strides[split], 1))
    everything = tuple(slice(0, len(each)) for each in kept[split + 1 :])
    for lead in product(*(enumerate(each.tolist()) for each in kept[:split])):
        base = entry.offsets[0] + sum(unit * stride for (_, unit), stride in zip(lead, strides, strict=False))
        for first in range(0, shape[split], step):
            last = min(first + step, shape[split])
            low, high = np.searchsorted(kept[split], (first, last)).tolist()
            if low < high:
                yield Region(
                    base + first * strides[split],
                    (1,) * split + (last - first,) + shape[split + 1 :],
                    (np.zeros(1, np.int64),) * split + (kept[split][low:high] - first, *kept[split + 1 :]),
                    (*(slice(place, place + 1) for place, _ in lead), slice(low, high), *everything),
                )


def spans(rows: Indices, gap: int) -> list[tuple[int, int]]:
    """Runs of consecutive rows to read, (first, past the last): dropped rows are skipped where `gap` or more meet."""
    breaks = np.flatnonzero(np.diff(rows) > gap) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


def read_region(entry: Entry, region: Region, workspace: Workspace) -> Array:
    """The kept values of a region.

    Raises:
        CheckpointError: the file ends early.
    """
    dtype = np.dtype(f"u{BYTES[entry.dtype]}")
    if not region.shape:
        whole = workspace.array(0, (), dtype)
        read_into(entry, region.start, whole)
        return whole
    split = next((dim for dim, length in enumerate(region.shape) if length > 1), len(region.shape) - 1)
    rows, row_bytes = region.kept[split], prod(region.shape[split + 1 :]) * dtype.itemsize
    runs = spans(rows, max(1, GAP_BYTES // row_bytes))
    read = sum(last - first for first, last in runs)
    stored = workspace.array(0, (*region.shape[:split], read, *region.shape[split + 1 :]), dtype)
    target, held, done = stored.reshape(-1).view(np.uint8), [], 0
    for first, last in runs:
        count = last - first
        read_into(entry, region.start + first * row_bytes, target[done * row_bytes : (done + count) * row_bytes])
        inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
        held.append(inside - first + done)
        done += count
    kept = (*region.kept[:split], np.concatenate(held), *region.kept[split + 1 :])
    slots = cycle((1, 2))  # never the one that is cut from, which numpy would copy first
    return cut(stored, kept, lambda shape: workspace.array(next(slots), shape, dtype))


@dataclass(frozen=True)
class Choice:
    """What stays of a tensor.

    kept    positions along each dimension, ascending
    after   what is done to the kept values of a region, if anything: (values, where they go) to values
    """

    kept: list[Indices]
    after: Callable[[Array, tuple[slice, ...]], Array] | None = None


@dataclass(frozen=True)
class Cut:
    """A tensor on disk and what stays of it; `choose` is asked when the tensor's turn comes, and its answer let go.

    `shape` is what there is room for: where it is told, another answer is an error before a byte is written.
    """

    entry: Entry
    choose: Callable[[], Choice]
    shape: tuple[int, ...] | None = None

    def _chosen(self) -> tuple[Choice, tuple[int, ...]]:
        choice = self.choose()
        shape = tuple(len(each) for each in choice.kept)
        if self.shape not in (None, shape):
            raise CheckpointError(
                f"{self.entry.name}: the cut leaves {list(shape)}, the plan said {list(self.shape or ())}; please "
                "report this as a bug."
            )
        return choice, shape

    def blocks(self, limit: int | None = None) -> Iterator[tuple[int, Produce]]:
        """The result in parts, each made from at most `limit` bytes (default `BLOCK_BYTES`) on disk."""
        choice, sizes = self._chosen()
        for region in regions(self.entry, choice.kept, limit or BLOCK_BYTES):
            place = 0
            for part, size in zip(region.at, sizes, strict=True):
                place = place * size + part.start
            yield place * BYTES[self.entry.dtype], partial(self._read, region, choice)

    def _read(self, region: Region, choice: Choice, workspace: Workspace) -> Array:
        values = read_region(self.entry, region, workspace)
        return values if choice.after is None else choice.after(values, region.at)

    def __call__(self) -> torch.Tensor:
        """The whole result in memory, in its own dtype, on the CPU."""
        _, shape = self._chosen()
        target, workspace = np.empty(prod(shape) * BYTES[self.entry.dtype], np.uint8), Workspace()
        for place, produce in self.blocks():
            values = produce(workspace).reshape(-1).view(np.uint8)
            target[place : place + len(values)] = values
        return tensor_of(target, self.entry.dtype, shape)


@dataclass(frozen=True)
class Stack:
    """Tensors of one size behind one another, each cut in its own way."""

    parts: tuple[Cut, ...]
    part_bytes: int

    def blocks(self, limit: int | None = None) -> Iterator[tuple[int, Produce]]:
        """The parts in order, each as `Cut.blocks`."""
        for number, part in enumerate(self.parts):
            for place, produce in part.blocks(limit):
                yield number * self.part_bytes + place, produce

    def __call__(self) -> torch.Tensor:
        """The whole result in memory, in its own dtype, on the CPU."""
        import torch

        return torch.stack([part() for part in self.parts])


@dataclass(frozen=True)
class Whole:
    """A tensor on disk of which everything stays."""

    entry: Entry

    def blocks(self) -> Iterator[tuple[int, Produce]]:
        """Its bytes in order, whatever its shape."""
        step = max(BLOCK_BYTES // 8, 1) * 8
        for place in range(0, self.entry.nbytes, step):
            yield place, partial(self._read, place, min(step, self.entry.nbytes - place))

    def _read(self, place: int, count: int, workspace: Workspace) -> Array:
        itemsize = BYTES[self.entry.dtype]
        values = workspace.array(0, (count // itemsize,), f"u{itemsize}")
        read_into(self.entry, self.entry.offsets[0] + place, values)
        return values


def all_finite(values: Array, dtype: str) -> bool:
    """Whether no value, given as unsigned integers, is NaN or infinite; whole numbers always are finite."""
    if dtype not in _BEYOND_FINITE or not values.size:
        return True
    # As integers, signed ones show the largest positive value, unsigned ones the largest negative one.
    beyond, sign = _BEYOND_FINITE[dtype], 1 << (8 * values.itemsize - 1)
    return int(values.view(f"i{values.itemsize}").max()) < beyond and int(values.max()) < sign + beyond
