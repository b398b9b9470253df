"""Read activations where a family says they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from minitron_cli.families.schema import Tap, holds
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class PlacedTap:
    """A tap at one layer of a loaded model."""

    kind: str
    tap: Tap
    layer: int | None
    module: torch.nn.Module

    @classmethod
    def at(cls, model: torch.nn.Module, kind: str, tap: Tap, layer: int | None) -> PlacedTap:
        """Find the module."""
        path = tap.module if layer is None else tap.module.format(layer=layer)
        return cls(kind, tap, layer, model.get_submodule(path))


def place_taps(model: torch.nn.Module, shape: Shape, kinds: tuple[str, ...]) -> Iterator[PlacedTap]:
    """Every tap of the wanted kinds whose conditions hold, at every layer whose tags it asks for."""
    for kind in kinds:
        for tap, layer in find_taps(shape, kind):
            yield PlacedTap.at(model, kind, tap, layer)


def find_taps(shape: Shape, kind: str) -> Iterator[tuple[Tap, int | None]]:
    """The taps of a kind, and the layers they are at; needs no model."""
    full = shape.family.with_defaults(shape.config)
    tags = shape.family.layer_tags(shape.config, shape["layers"])
    for tap in shape.family.taps.get(kind, ()):
        if not all(holds(full, condition) for condition in tap.conditions):
            continue
        if "{layer}" not in tap.module:
            yield tap, None
            continue
        for layer in range(shape["layers"]):
            if tags[layer].issuperset(tap.tags):
                yield tap, layer


def first_tensor(value: Any) -> torch.Tensor:
    """The activation among a module's inputs or outputs: the first tensor."""
    return value if isinstance(value, torch.Tensor) else value[0]


@contextmanager
def listening(taps: list[PlacedTap], heard: Callable[[PlacedTap, torch.Tensor], None]) -> Iterator[None]:
    """Call `heard(tap, activation)` during forward passes, activation (batch, seq, dims); hooks are always removed."""
    handles = []

    def hook_for(placed: PlacedTap) -> Callable[..., None]:
        if placed.tap.side == "input":
            return lambda module, args, kwargs, output: heard(placed, args[0] if args else next(iter(kwargs.values())))
        return lambda module, args, kwargs, output: heard(placed, first_tensor(output))

    try:
        for placed in taps:
            handles.append(placed.module.register_forward_hook(hook_for(placed), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped_layer(placed: PlacedTap) -> Iterator[None]:
    """Run with one decoder layer replaced by the identity on its input."""

    def bypass(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return entering if isinstance(output, torch.Tensor) else (entering, *output[1:])

    handle = placed.module.register_forward_hook(bypass, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
