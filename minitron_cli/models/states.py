"""States inside a model, read during its forward pass: embeddings, block outputs, MLP inputs, queries, keys, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minitron_cli.errors import FamilyError
from minitron_cli.families.expression import Product, Sum, parse, size
from minitron_cli.families.schema import Tap
from minitron_cli.models.taps import PlacedTap, find_taps, listening
from minitron_cli.shape import Shape

T = TypeVar("T")
HEADS = ("query", "key", "value")
"""Outputs of the projections into heads, before any norm or rotation."""
_KINDS = {"embeddings": "block", "blocks": "block", "mlp_inputs": "mlp"}
"""Tap kinds, where they are not called as the stream."""


class Place(NamedTuple):
    """What is read (`embeddings`, `blocks`, `mlp_inputs`, `query`, `key`, `value`), and in which layer.

    Embeddings are what enters layer 0: scaled and with positions added, as the family does.
    """

    stream: str
    layer: int


States = Mapping[Place, Tensor]


def tap_at(shape: Shape, place: Place) -> tuple[str, Tap]:
    """Where a family says the state is: the tap and its kind, `qkv` where queries, keys and values are fused.

    Raises:
        FamilyError: it does not say.
    """
    kinds = (_KINDS.get(place.stream, place.stream), *(("qkv",) if place.stream in HEADS else ()))
    for kind in kinds:
        for tap, layer in find_taps(shape, kind):
            if layer == place.layer:
                return kind, replace(tap, side="input") if place.stream == "embeddings" else tap
    option = "attention" if place.stream in HEADS else place.stream
    raise FamilyError(
        f"The {shape.family.name} family does not say where layer {place.layer} has its {place.stream}; "
        f"leave {option} out of --states or map another layer."
    )


@dataclass(frozen=True)
class Listener:
    """Reads some places of one model; without places it only runs the model."""

    taps: Mapping[Place, PlacedTap] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def at(cls, model: torch.nn.Module, shape: Shape, places: Iterable[Place]) -> Listener:
        """Find the places.

        Raises:
            FamilyError: the family does not say where one of them is.
        """
        found = {place: PlacedTap.at(model, *tap_at(shape, place), place.layer) for place in places}
        return cls(found, shape.sizes)

    def run(self, forward: Callable[[], T], batch: int) -> tuple[T, States]:
        """What `forward` returns for `batch` sequences, and the state of every place, (batch, seq, channels).

        Hooks only keep references: work inside them would be repeated, and lost to autograd, where a layer runs again
        to recompute its activations.
        """
        heard: dict[PlacedTap, Tensor] = {}
        with listening(list(set(self.taps.values())), heard.__setitem__):
            output = forward()
        return output, {place: self._state(place, heard[placed], batch) for place, placed in self.taps.items()}

    def _state(self, place: Place, raw: Tensor, batch: int) -> Tensor:
        raw = raw.reshape(batch, -1, raw.shape[-1])  # OPT's MLP sees (batch * seq, hidden)
        placed = self.taps[place]
        if placed.kind != "qkv":
            return raw
        return split_fused(raw, placed.tap.dims, self.sizes)[HEADS.index(place.stream)]


def split_fused(fused: Tensor, dims: str, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """(..., channels) of a fused projection to its queries, keys and values, each with its heads in order.

    `dims` is a sum of the three, or such sums nested in groups of heads.
    """
    expression = parse(dims)
    inner = expression.factors[-1] if isinstance(expression, Product) else expression
    assert isinstance(inner, Sum) and len(inner.terms) == len(HEADS), "a fused projection is a sum of three"
    widths = [size(term, sizes) for term in inner.terms]
    nested = fused.view(*fused.shape[:-1], -1, sum(widths))
    return tuple(part.flatten(-2) for part in torch.split(nested, widths, dim=-1))
