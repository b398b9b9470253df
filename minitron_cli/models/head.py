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
from minitron_cli.models.split import add_gradient, device_of, is_split, whole

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
        self._seats: dict[Any, tuple[Any, str]] = {}

    @property
    def vocab(self) -> int:
        """Logits per token."""
        return int(self.model.config.get_text_config().vocab_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, vocab) logits in fp32; gradients flow to `hidden` and the head's weights."""
        if is_split(self.model.get_output_embeddings().weight):  # the stock product knows no parts
            return self.into(self.buffer(len(hidden)), hidden)
        return self._after(hidden)

    def _after(self, hidden: Tensor) -> Tensor:
        """What the stock class makes of finished hidden states."""
        finished = self._kind(last_hidden_state=hidden[None], **self._rest)
        placeholder = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self._standing_in(backbone_of(self.model), lambda *args, **kwargs: finished):
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
        `.grad` in place, or where the weight is split, waits for `reduce`.
        """

        def product(states: Tensor) -> Tensor:
            flat = states.flatten(0, -2)
            logits: Tensor = _Product.apply(flat, self.projection, _Untracked(buffer), words)  # type: ignore[no-untyped-call]
            return logits.view(*states.shape[:-1], -1)

        with self._standing_in(self.projection.module, product):
            return self._after(hidden)

    @contextmanager
    def _standing_in(self, module: Any, function: Any) -> Iterator[None]:
        """Calls of a module of the model run `function` instead, and none of the module's hooks."""
        if module not in self._seats:
            path = next(name for name, each in self.model.named_modules() if each is module)
            holder, _, name = path.rpartition(".")
            self._seats[module] = self.model.get_submodule(holder), name
        parent, name = self._seats[module]
        setattr(parent, name, _StandIn(module, function))
        try:
            yield
        finally:
            setattr(parent, name, module)

    def buffer(self, tokens: int, words: int | None = None) -> Tensor:
        """Memory for `into`: (tokens, words or the whole vocabulary), uninitialised."""
        weight, matrix = self.projection.weight, self.projection.matrix
        return torch.empty(tokens, words or len(matrix), dtype=_wide(weight.dtype), device=matrix.device)

    def reduce(self) -> None:
        """Where the weight is split, add the gradients of all processes to their parts; every process must call it."""
        if self._projection is not None:
            self._projection.reduce()


class Projection:
    """A linear map (words, hidden), in the type that autocast asks for where it is on.

    A split weight is gathered here, once, in that type; its gradient is summed whole, in fp32, until `reduce`.
    """

    def __init__(self, module: Any) -> None:
        if not isinstance(module, torch.nn.Linear) or type(module).forward is not torch.nn.Linear.forward:
            raise FamilyError(
                f"The output head is a {type(module).__name__}, not a linear layer; it cannot be trained."
            )
        self.module, self.weight, self.bias = module, module.weight, module.bias
        device = device_of(module).type
        autocast = torch.is_autocast_enabled(device)
        self.matrix = whole(self.weight.detach(), torch.get_autocast_dtype(device) if autocast else self.weight.dtype)
        self.offset = None if self.bias is None else whole(self.bias.detach())
        self._sums: dict[Tensor, Tensor] = {}

    def product(self, states: Tensor, words: slice, out: Tensor) -> None:
        """Write states @ matrix[words].T + bias[words]; rounded to the compute type before `out`, which is wider."""
        matrix = self.matrix[words].t()
        if self.matrix.dtype == out.dtype:
            torch.mm(states, matrix, out=out)
        else:
            out.copy_(torch.mm(states, matrix))
        if self.offset is not None:
            out.add_(self.offset[words])

    def accumulate(self, gradient: Tensor, states: Tensor, words: slice) -> None:
        """Add what (tokens, words) gradients of the product mean for weight and bias to their `.grad`."""
        if self.bias is not None and self.bias.requires_grad:
            self._gradient_of(self.bias)[words] += gradient.sum(0)
        if not self.weight.requires_grad:
            return
        total = self._gradient_of(self.weight)[words]
        rounded = gradient.to(states.dtype).t()
        if states.dtype == total.dtype:
            total.addmm_(rounded, states)
            return
        for start in range(0, len(total), WORDS):  # so that the product in a narrow type stays small
            total[start : start + WORDS] += torch.mm(rounded[start : start + WORDS], states)

    def _gradient_of(self, parameter: Tensor) -> Tensor:
        """Where the parameter's gradient is summed: its `.grad`, or where it is split, memory for all of it."""
        if not is_split(parameter):
            return _gradient_of(parameter)
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros(
                parameter.shape, dtype=_wide(parameter.dtype), device=self.matrix.device
            )
        return self._sums[parameter]

    def reduce(self) -> None:
        """Add what split parameters have gathered to their parts; in every process, whether it had tokens or not."""
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.requires_grad and is_split(parameter):
                add_gradient(parameter, self._gradient_of(parameter))
        self._sums.clear()


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


class _StandIn(torch.nn.Module):
    """Takes a module's place; attributes that are asked for are the module's own."""

    def __init__(self, module: Any, function: Any) -> None:
        super().__init__()
        # Not a submodule: its parameters must not be listed here too.
        self.__dict__.update(stands_for=module, forward=function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)


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
