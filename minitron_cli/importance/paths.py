"""Paths through a model with some layers removed: which there are, what they share, and walking many at once.

Two paths that removed the same of the first n layers have the same states there, so states are kept by what was removed
so far. Every single layer's removal then costs about half of L forward passes instead of L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minitron_cli.models.streaming import ResidentModel, StreamedModel

Model = ResidentModel | StreamedModel

Removed = frozenset[int]
"""A path: the numbers of the layers it leaves out."""

FULL: Removed = frozenset()
"""The path of the whole model."""

States = dict[Removed, list[torch.Tensor]]
"""What was removed so far, to the hidden states (batch, seq, hidden) of each batch."""


def runs(layers: int, count: int) -> list[Removed]:
    """The paths without one contiguous run of `count` layers, by its first layer; `count` 1: each layer alone."""
    return [frozenset(range(first, first + count)) for first in range(layers - count + 1)]


def before(path: Removed, layer: int) -> Removed:
    """What a path has removed when it comes to a layer."""
    return frozenset(number for number in path if number < layer)


@dataclass(frozen=True)
class Leg:
    """Paths that are walked together, from layer `start` to the end.

    All of them share `trunk` up to `start`. The trunk's states at layer `keep` are the beginning of the next leg.
    """

    paths: tuple[Removed, ...]
    trunk: Removed
    start: int
    keep: int | None

    def histories(self, layer: int) -> list[Removed]:
        """The different pasts of all that arrives at a layer."""
        arriving = dict.fromkeys(before(path, layer) for path in self.paths)
        if self.keep is not None and layer <= self.keep:
            arriving.setdefault(before(self.trunk, layer))
        return list(arriving)

    def through(self, layer: int) -> list[Removed]:
        """The pasts whose states run through a layer."""
        return [history for history in self.histories(layer + 1) if layer not in history]


def legs(paths: Sequence[Removed], trunk: Removed, together: int) -> list[Leg]:
    """Split paths into legs of at most `together`, as equal as can be; the whole model walks with the first.

    Args:
        paths: each removes the trunk's layers and more, in the order of the first layer it removes beyond them.
    """
    if not paths:
        return []
    size = math.ceil(len(paths) / math.ceil(len(paths) / together))
    parts = [tuple(paths[first : first + size]) for first in range(0, len(paths), size)]
    # A later leg begins where its first path leaves the trunk.
    starts = [0, *(min(part[0] - trunk) for part in parts[1:])]
    parts[0] = (FULL, *parts[0])
    keeps = [*starts[1:], None]
    return [Leg(part, trunk, start, keep) for part, start, keep in zip(parts, starts, keeps, strict=True)]


def carry(
    model: Model, leg: Leg, states: States, on_batch: Callable[[torch.Tensor], None] = lambda hidden: None
) -> tuple[States, list[torch.Tensor]]:
    """Walk a leg: each layer is in memory once, all batches of all paths run through it.

    Args:
        states: the trunk's at layer `leg.start`; taken over.

    Returns:
        Every path's states after the last layer, and the trunk's at `leg.keep`.
    """
    kept: list[torch.Tensor] = []
    for number in range(leg.start, len(model.layers)):
        if number == leg.keep:
            kept = list(states[before(leg.trunk, number)])
        following, through = leg.histories(number + 1), leg.through(number)
        for history in following:
            if number in history:  # steps over the layer: what comes out is what went in
                states[history] = list(states[history - {number}])
        if through:
            with model.loaded(number):
                for hidden in (states[history] for history in through):
                    for index in range(len(hidden)):
                        hidden[index] = model.layer(number, hidden[index])
                        on_batch(hidden[index])
        states = {history: states[history] for history in following}
    return states, kept
