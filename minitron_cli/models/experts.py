"""Listen to routed experts. Stock classes hold all experts of a layer in one module, inside which no hook sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from minitron_cli.models.taps import PlacedTap

KIND = "experts"
"""Kind of the taps on these modules."""


@dataclass(frozen=True)
class Passed:
    """What one expert did with the tokens that the router sent it.

    tokens   their numbers among all tokens of the pass, ascending, (n,)
    weights  what the router multiplies the outputs by, (n,)
    neurons  what enters its last projection, (n, expert_ffn)
    outputs  what comes out of that, before the router's weights, (n, channels)
    """

    expert: int
    tokens: Tensor
    weights: Tensor
    neurons: Tensor
    outputs: Tensor


HeardExperts = Callable[[PlacedTap, int, Iterator[Passed]], None]
"""(tap, tokens of the pass, what each expert that was sent any did, computed as it is asked for)."""


@contextmanager
def listening_experts(taps: list[PlacedTap], heard: HeardExperts) -> Iterator[None]:
    """Run the experts of these modules one after another, and tell of each; the modules are always put back."""
    try:
        for placed in taps:
            placed.module.forward = partial(_forward, placed, heard)
        yield
    finally:
        for placed in taps:
            placed.module.__dict__.pop("forward", None)


def outgoing_norms(experts: Any) -> Tensor:
    """Norm of the weights by which each neuron leaves its expert, (experts, expert_ffn) fp32."""
    norms: Tensor = experts.down_proj.float().norm(dim=-1 if experts.is_transposed else -2)
    return norms


def _forward(placed: PlacedTap, heard: HeardExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The stock signature: (tokens, channels), chosen experts and their weights, (tokens, chosen) each."""
    output = torch.zeros_like(hidden)
    passes = _passes(placed.module, hidden, index, weights, output)
    heard(placed, len(hidden), passes)
    for _ in passes:  # what was not asked for belongs to the output all the same
        pass
    return output


def _passes(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> Iterator[Passed]:
    """Each expert's part, added to the output."""
    for number in sorted(set(index.flatten().tolist())):
        tokens, place = torch.where(index == number)
        weight = weights[tokens, place]
        neurons, found = _one_expert(experts, number, hidden[tokens])
        yield Passed(number, tokens, weight, neurons, found)
        output.index_add_(0, tokens, (found * weight[:, None]).to(output.dtype))


def _one_expert(experts: Any, number: int, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons (n, expert_ffn) and outputs (n, channels); `use_experts_implementation` says how weights are stored."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inside = _product(experts, name, number, entering)
    neurons: Tensor = experts._apply_gate(inside) if experts.has_gate else experts.act_fn(inside)
    found = _product(experts, "down_proj", number, neurons)
    return neurons, experts.post_expert_norm(found) if experts.has_post_expert_norm else found


def _product(experts: Any, name: str, number: int, entering: Tensor) -> Tensor:
    weight = getattr(experts, name)[number]
    bias = getattr(experts, f"{name}_bias")[number] if experts.has_bias else None
    return linear(entering, weight.t() if experts.is_transposed else weight, bias)
