"""Tensors of a rotated residual stream: made block by block from those on disk, like tensors that are only cut.

With an orthogonal basis Q every state x of the stream becomes Q^T x. An RMS norm computes the same root mean square of
both; its weight, which scales single channels, moves into the linears that read it (`W diag(w) Q`), and those that
write into the stream become `Q^T W`. Uncut, that is the same function.

A table E that is embedding and head would become two, E Q and E diag(w) Q. It becomes one, halfway between them, unless
the plan unties it (`Shared`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from minitron_cli.checkpoint.blocks import BLOCK_BYTES, Array, Choice, Cut, Produce, Workspace
from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.reader import Checkpoint, Entry
from minitron_cli.checkpoint.surgery import Indices
from minitron_cli.families.schema import BYTES
from minitron_cli.importance.store import load_basis
from minitron_cli.prune.edit import Edit
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.residual import tied_head

Vector = Callable[[], torch.Tensor]
"""Makes a tensor (hidden,) fp32, of channels or of kept directions."""


class Basis:
    """The kept directions of the stream, read when they are first needed: (hidden, kept) fp32."""

    def __init__(self, directory: Path, hidden: int, kept: int) -> None:
        self._place = directory, hidden, kept

    @cached_property
    def columns(self) -> torch.Tensor:
        """The directions.

        Raises:
            InputError: they are not there.
        """
        return load_basis(*self._place)


@dataclass(frozen=True)
class Rotated:
    """A tensor that reads or writes the stream.

    kept    positions along each dimension but the hidden one, of which all are used
    dim     which dimension the hidden one is
    scales  factors along each dimension, of kept positions
    fold    factors of the original's channels: the weight of the norm that is read, as it is applied
    """

    entry: Entry
    kept: list[Indices]
    dim: int
    scales: list[Array]
    basis: Basis
    fold: Vector | None = None

    def blocks(self, limit: int | None = None) -> Iterator[tuple[int, Produce]]:
        """The result in parts, each made from at most `limit` bytes (default `BLOCK_BYTES`) where rows allow it."""
        row_bytes = self.basis.columns.shape[1] * BYTES[self.entry.dtype]
        for rows in self._runs(limit or BLOCK_BYTES):
            yield rows.start * row_bytes, partial(self._produce, rows)

    def _runs(self, limit: int) -> Iterator[slice]:
        """Runs of rows; where columns write into the stream every row of the result needs all of the tensor."""
        rows = len(self.kept[0])
        step = rows if self.dim == 0 else max(1, limit // (self.entry.shape[1] * BYTES[self.entry.dtype]))
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))

    def _produce(self, rows: slice, workspace: Workspace) -> Array:
        stored = self._made(rows).contiguous()
        return stored.view(torch.uint8).numpy().reshape(-1).view(f"u{BYTES[self.entry.dtype]}").reshape(stored.shape)

    def _made(self, rows: slice) -> torch.Tensor:
        kept = [self.kept[0][rows], *self.kept[1:]]
        values = Cut(self.entry, lambda: Choice(kept))().to(torch.float32)
        for dim, along in enumerate(self.scales):
            part = torch.from_numpy(along[rows] if dim == 0 else along)
            values *= part.view([-1 if each == dim else 1 for each in range(values.ndim)])
        if self.dim == 0:
            values = self.basis.columns.t() @ values
        else:
            values = (values if self.fold is None else values * self.fold()) @ self.basis.columns
        return values.to(TORCH_DTYPES[self.entry.dtype])

    def __call__(self) -> torch.Tensor:
        """The whole result in memory, in its own dtype, on the CPU."""
        return torch.cat([self._made(rows) for rows in self._runs(BLOCK_BYTES)])


@dataclass(frozen=True)
class Rotation:
    """How the tensors of one checkpoint are rotated.

    folds   linear to the norm whose output it reads, names on disk
    shared  the table that is embedding and head, where it stays both
    """

    checkpoint: Checkpoint
    basis: Basis
    folds: dict[str, str]
    shared: Shared | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: PrunePlan) -> Rotation:
        """The rotation of a plan."""
        shape = checkpoint.shape
        basis = Basis(Path(plan.statistics), shape["hidden"], plan.sizes["hidden"])
        folds = {
            reader.replace("{layer}", str(layer)): norm.replace("{layer}", str(layer))
            for norm, readers in shape.family.readers.items()
            for reader in readers
            for layer in (plan.layers if "{layer}" in norm else (0,))
        }
        head = None if plan.untie else tied_head(shape)
        shared = None if head is None else Shared(shape.family.tied[head], folds[head])
        return cls(checkpoint, basis, folds, shared)

    def of_tensor(self, entry: Entry, edit: Edit) -> Rotated | Norm | None:
        """How a tensor is made; None where it has nothing to do with the stream."""
        dims = edit.tensor.dims
        if "hidden" not in dims:
            return None
        if edit.tensor.role == "norm":
            return Norm(entry, partial(self._left_to_apply, edit), edit.offset)
        kept = edit.selections(whole="hidden")
        return Rotated(entry, kept, dims.index("hidden"), edit.scales(kept), self.basis, self._fold(edit.name))

    def _fold(self, name: str) -> Vector | None:
        if self.shared is not None and name == self.shared.table:
            norm = self.shared.norm
            return lambda: halfway(self._applied(norm))
        return partial(self._applied, self.folds[name]) if name in self.folds else None

    def _left_to_apply(self, edit: Edit) -> torch.Tensor:
        """What a norm still multiplies kept directions by: nothing but the plan's factor, as its readers took its
        weight over, unless one of them is a shared table.
        """
        left = torch.ones(edit.plan.sizes["hidden"])
        if self.shared is not None and edit.name == self.shared.norm:
            left = matching(
                self.basis.columns, self._applied(edit.name), gram(self.checkpoint.entries[self.shared.table])
            )
        return left * edit.factor

    def _applied(self, norm: str) -> torch.Tensor:
        """A norm's weight as the stock class applies it, (hidden,) fp32."""
        tensor, _ = self.checkpoint.declared[norm]
        return self.checkpoint.read(norm).to(torch.float32) + (tensor.norm or self.checkpoint.shape.family.norm).offset


@dataclass(frozen=True)
class Shared:
    """A table that is embedding and head, and the norm before the head, names on disk."""

    table: str
    norm: str


def halfway(weight: torch.Tensor) -> torch.Tensor:
    """Factors m of a shared table's channels, (1 + w / mean w) / 2: between an embedding's, 1, and a head's, w.

    Args:
        weight: of the norm before the head, as it is applied, (hidden,).
    """
    return (1 + weight / weight.mean()) / 2


def matching(columns: torch.Tensor, weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Factors g of the norm before a shared table T = E diag(m) Q, with which T diag(g) is nearest to the head
    E diag(w) Q by least squares: (kept,).

    Args:
        columns: Q, (hidden, kept).
        weight: w, (hidden,); see `halfway` for m.
        products: E^T E, (hidden, hidden) fp64.
    """
    columns, weight = columns.double(), weight.double()
    table, head = halfway(weight)[:, None] * columns, weight[:, None] * columns
    return ((table * (products @ head)).sum(0) / (table * (products @ table)).sum(0)).float()


def gram(table: Entry) -> torch.Tensor:
    """E^T E of a table (words, hidden), read block by block: (hidden, hidden), fp64 sums of fp32 products."""
    words, hidden = table.shape
    step = max(1, BLOCK_BYTES // (hidden * BYTES[table.dtype]))
    total = torch.zeros(hidden, hidden, dtype=torch.float64)
    for first in range(0, words, step):
        rows = np.arange(first, min(first + step, words))
        block = Cut(table, lambda rows=rows: Choice([rows, np.arange(hidden)]))().float()  # type: ignore[misc]
        total += block.t() @ block
    return total


@dataclass(frozen=True)
class Norm:
    """The weight of a norm of the rotated stream, in the type it had."""

    entry: Entry
    applied: Vector
    offset: float

    def blocks(self, limit: int | None = None) -> Iterator[tuple[int, Produce]]:
        """All of it at once."""
        yield 0, lambda workspace: self().view(torch.uint8).numpy().view(f"u{BYTES[self.entry.dtype]}")

    def __call__(self) -> torch.Tensor:
        """The whole tensor."""
        return (self.applied() - self.offset).to(TORCH_DTYPES[self.entry.dtype])
