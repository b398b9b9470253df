"""The output head on its own: logits of some hidden states, exactly as the stock class makes them.

The stock forward runs with its backbone replaced by finished hidden states, so that soft-caps, logit scales and
divisors of every family apply without being listed anywhere. Where logits are many, its projection is replaced too: by
the same product into a buffer of the caller's, in fp32 before anything follows it, whose backward adds to the weight's
gradient in place (autograd would allocate a second one, vocabulary x hidden, at every call).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minitron_cli.errors import FamilyError

ALL = slice(None)
WORDS = 1 << 14
"""Rows of a weight's gradient formed at once in a type narrower than it."""


def backbone_of(model: Any) -> Any:
    """The module whose output the head takes: most often the base model, in OPT the decoder inside it."""
    return model.get_decoder()


def backbone_output(model: Any, ids: Tensor) -> Any:
    """The output of the model without its head for (batch, seq) ids; `.last_hidden_state` is (batch, seq, hidden)."""
    return backbone_of(model)(input_ids=ids, use_cache=False)


class Head:
    """The head of a model, after one of its backbone's outputs (which may carry more than hidden states)."""

    def __init__(self, model: Any, output: Any) -> None:
        self.model = model
        self._kind = type(output)
        self._rest = {name: value for name, value in output.items() if name != "last_hidden_state"}
        self._projection: Projection | None = None

    @property
    def vocab(self) -> int:
        """Logits per token."""
        return int(self.model.config.get_text_config().vocab_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, vocab) logits in fp32; gradients flow to `hidden` and the head's weights."""
        finished = self._kind(last_hidden_state=hidden[None], **self._rest)
        placeholder = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _forward_of(backbone_of(self.model), lambda *args, **kwargs: finished):
            logits: Tensor = self.model(input_ids=placeholder, use_cache=False).logits
        return logits.flatten(0, 1).to(_wide(logits.dtype))

    @property
    def projection(self) -> Projection:
        """The linear map at the heart of the head, in the compute type of the first use.

        Raises:
            FamilyError: the stock class ends in something else.
        """
        if self._projection is None:
            self._projection = Projection(self.model.get_output_embeddings())
        return self._projection

    def into(self, buffer: Tensor, hidden: Tensor, words: slice = ALL) -> Tensor:
        """The same logits, or those of some words, with the product written to `buffer` (tokens or more, words).

        The result is the buffer's memory where nothing follows the projection, and may be overwritten before
        `backward`, with its own gradient for instance. Where gradients flow, that of the head's weight is added to
        `.grad` in place.
        """

        def product(states: Tensor) -> Tensor:
            flat = states.flatten(0, -2)
            logits: Tensor = _Product.apply(flat, self.projection, _Untracked(buffer), words)  # type: ignore[no-untyped-call]
            return logits.view(*states.shape[:-1], -1)

        with _forward_of(self.projection.module, product):
            return self(hidden)

    def buffer(self, tokens: int, words: int | None = None) -> Tensor:
        """Memory for `into`: (tokens, words or the whole vocabulary), uninitialised."""
        weight = self.projection.weight
        return torch.empty(tokens, words or len(weight), dtype=_wide(weight.dtype), device=weight.device)


class Projection:
    """A linear map (words, hidden), in the type that autocast asks for where it is on."""

    def __init__(self, module: Any) -> None:
        if not isinstance(module, torch.nn.Linear) or type(module).forward is not torch.nn.Linear.forward:
            raise FamilyError(
                f"The output head is a {type(module).__name__}, not a linear layer; it cannot be trained."
            )
        self.module, self.weight, self.bias = module, module.weight, module.bias
        device = self.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        self.matrix = self.weight.detach().to(torch.get_autocast_dtype(device) if autocast else self.weight.dtype)

    def product(self, states: Tensor, words: slice, out: Tensor) -> None:
        """Write states @ matrix[words].T + bias[words]; rounded to the compute type before `out`, which is wider."""
        matrix = self.matrix[words].t()
        if self.matrix.dtype == out.dtype:
            torch.mm(states, matrix, out=out)
        else:
            out.copy_(torch.mm(states, matrix))
        if self.bias is not None:
            out.add_(self.bias[words])

    def accumulate(self, gradient: Tensor, states: Tensor, words: slice) -> None:
        """Add what (tokens, words) gradients of the product mean for weight and bias to their `.grad`."""
        if self.bias is not None and self.bias.requires_grad:
            _gradient_of(self.bias)[words] += gradient.sum(0)
        if not self.weight.requires_grad:
            return
        total = _gradient_of(self.weight)[words]
        rounded = gradient.to(states.dtype).t()
        if states.dtype == total.dtype:
            total.addmm_(rounded, states)
            return
        for start in range(0, len(total), WORDS):  # so that the product in a narrow type stays small
            total[start : start + WORDS] += torch.mm(rounded[start : start + WORDS], states)


class _Product(torch.autograd.Function):
    """`Projection.product` in a buffer: hidden states (tokens, hidden) to the first rows of it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, projection: Projection, buffer: _Untracked, words: slice) -> Tensor:
        ctx.projection, ctx.words, ctx.dtype = projection, words, states.dtype
        with _no_autocast(states):
            states = states.to(projection.matrix.dtype)
            ctx.save_for_backward(states)
            rows = buffer.tensor[: len(states)]
            projection.product(states, words, rows)
        return rows.data  # a tensor of its own: views of one buffer would be versions of each other to autograd

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (states,) = ctx.saved_tensors
        with _no_autocast(states):
            ctx.projection.accumulate(gradient, states, ctx.words)
            hidden = torch.mm(gradient.to(states.dtype), ctx.projection.matrix[ctx.words])
        return hidden.to(ctx.dtype), None, None, None


class _Untracked:
    """A tensor that autograd does not see among a function's inputs, so that outputs may be views of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def _forward_of(module: Any, function: Any) -> Iterator[None]:
    """Calls of the module run `function` instead."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward  # the class's own is visible again


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _gradient_of(parameter: Tensor) -> Tensor:
    """The parameter's `.grad`, zero where there was none; sums over tokens are kept in fp32 or better."""
    assert parameter.dtype == _wide(parameter.dtype), "trained weights are fp32"
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
