"""Run a stock causal LM one decoder layer at a time.

The stock backbone keeps its own forward: its list of layers is replaced, for one call, by stand-ins that record what
each layer would have been called with (masks, rotary tables) or that hand in a finished hidden state. So embeddings,
masks and final norms of every family apply without being listed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from minitron_cli.models.head import backbone_output
from minitron_cli.models.taps import first_tensor
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def moved(self, device: torch.device) -> Call:
        """The same call with its tensors on another device."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device))


def layer_list(model: Any, shape: Shape) -> tuple[torch.nn.Module, str, torch.nn.ModuleList]:
    """The backbone's list of decoder layers: the module that holds it, under which name, and the list."""
    (tap,) = shape.family.taps["block"]
    parent, name = tap.module.removesuffix(".{layer}").rsplit(".", 1)
    holder = model.get_submodule(parent)
    return holder, name, getattr(holder, name)


class LayerwiseModel:
    """A causal LM whose layers are run singly, in any order, on hidden states (batch, seq, hidden).

    `enter` gives the states that come into layer 0, `layer` runs one layer, `leave` gives the backbone's output of the
    states that come out of the last one. Run in sequence they are the stock forward, to the bit.
    """

    def __init__(self, model: Any, shape: Shape) -> None:
        self.model, self.shape = model, shape
        self._parent, self._name, self._stock_list = layer_list(model, shape)
        self.layers: list[torch.nn.Module] = list(self._stock_list)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._wrap: Callable[[torch.Tensor], Any] = lambda hidden: hidden
        self._wrap = self._output_kind()

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq) ids to the hidden states that enter layer 0; remembers what the layers are called with."""
        calls: list[Call] = []
        entered: list[torch.Tensor] = []

        def record(number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            entered.append(hidden)
            calls.append(call)
            return hidden

        with self._stand_ins(record):
            backbone_output(self.model, ids)
        # Ids are never padded here, so that masks and positions depend on their shape alone.
        self._calls[tuple(ids.shape)] = calls
        return entered[0]

    def layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one decoder layer on states (batch, seq, hidden) of a shape that has been through `enter`."""
        call = self._calls[tuple(hidden.shape[:2])][number]
        return first_tensor(self.layers[number](hidden, *call.args, **call.kwargs))

    def leave(self, hidden: torch.Tensor) -> Any:
        """The backbone's output for states that left the last layer; `.last_hidden_state` is (batch, seq, hidden)."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        last = len(self.layers) - 1
        with self._stand_ins(lambda number, passing, call: hidden if number == last else passing):
            return backbone_output(self.model, ids)

    @contextmanager
    def _stand_ins(self, respond: Respond) -> Iterator[None]:
        stand_ins = [_StandIn(number, layer, respond, self._wrap) for number, layer in enumerate(self.layers)]
        setattr(self._parent, self._name, torch.nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self._parent, self._name, self._stock_list)

    def _output_kind(self) -> Callable[[torch.Tensor], Any]:
        """How this model's layers return hidden states, bare or first in a tuple: run one (or its meta twin) to see."""
        reached: list[tuple[torch.Tensor, Call]] = []

        def stop(number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            reached.append((hidden, call))
            raise _Reached

        layer = self.layers[0]
        own, there = (next(module.parameters()).device for module in (self.model, layer))
        with torch.inference_mode():
            try:
                with self._stand_ins(stop):
                    backbone_output(self.model, torch.zeros(1, 1, dtype=torch.long, device=own))
            except _Reached:
                pass
            (hidden, call), *_ = reached
            call = call.moved(there)
            # Tables of a layer are real even where its weights are not.
            buffers = {name: buffer.to(there) for name, buffer in layer.named_buffers()}
            with _experts_without_values(self.model):
                output = torch.func.functional_call(layer, buffers, (hidden.to(there), *call.args), call.kwargs)
        if isinstance(output, torch.Tensor):
            return lambda hidden: hidden
        rest = tuple(output[1:])
        return lambda hidden: (hidden, *rest)


@contextmanager
def _experts_without_values(model: Any) -> Iterator[None]:
    """Experts run by the one stock product that works on the meta device in every type."""
    config, name = model.config, "_experts_implementation"
    before = getattr(config, name, None)
    if before is not None:
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


Respond = Callable[[int, torch.Tensor, Call], torch.Tensor]
"""(layer number, hidden states handed in, the rest of the call) to the hidden states to hand on."""


class _Reached(Exception):
    """The first layer was reached."""


class _StandIn(torch.nn.Module):
    """Takes a decoder layer's place in the backbone's loop; attributes the backbone asks for are the layer's own."""

    def __init__(
        self, number: int, layer: torch.nn.Module, respond: Respond, wrap: Callable[[torch.Tensor], Any]
    ) -> None:
        super().__init__()
        # Not a submodule: the layer must not be moved or listed twice.
        self.__dict__.update(number=number, stands_for=layer, respond=respond, wrap=wrap)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer instead of the layer."""
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        return self.wrap(self.respond(self.number, hidden, Call(rest, kwargs)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
