"""One forward pass of the stock model on the meta device: which modules run, in which order, with which widths.

The order tells roles without knowing names: the last matrix of an attention module writes to the residual stream, and
so does the last matrix of an MLP; a norm right before a matrix reads from it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from minitron_cli.families.schema import Norm
from minitron_cli.models.draft_probe import build


@dataclass(frozen=True)
class Call:
    """One module with weights of its own, in the order of the forward pass; widths are last dimensions."""

    path: str
    kind: Literal["matrix", "norm", "other"]
    width_in: int
    width_out: int
    inside: str
    """The innermost enclosing attention module, or the parent."""
    attention: bool
    transposed: bool


def trace(config: Mapping[str, Any]) -> list[Call]:
    """The calls of one forward pass; empty where the stock class cannot run on the meta device."""
    model = build(config, attn_implementation="eager").eval()
    for inputs in _inputs():
        calls: list[Call] = []
        with _listening(model, calls), torch.no_grad():
            try:
                model(**inputs, use_cache=False)
            except Exception:  # data-dependent code paths raise what they like on meta tensors
                continue
        return calls
    return []


def _inputs() -> Iterator[dict[str, torch.Tensor]]:
    """A finished four-dimensional mask passes most stock classes untouched; some build theirs from a flat one."""
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    finished = torch.zeros(1, 1, 2, 2, device="meta")
    yield {"input_ids": ids, "attention_mask": finished, "position_ids": torch.zeros_like(ids)}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield {"input_ids": ids}


@contextmanager
def _listening(model: torch.nn.Module, calls: list[Call]) -> Iterator[None]:
    modules = dict(model.named_modules())
    handles = []

    def hook_for(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append(_call(path, modules, args[0].shape[-1], output.shape[-1]))

        return hook

    for path, module in modules.items():
        if not any(module.children()):
            handles.append(module.register_forward_hook(hook_for(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(path: str, modules: Mapping[str, torch.nn.Module], width_in: int, width_out: int) -> Call:
    module = modules[path]
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    kind: Literal["matrix", "norm", "other"] = "other"
    if is_norm(module):
        kind = "norm"
    elif len(shape) == 2 and not isinstance(module, torch.nn.Embedding):
        kind = "matrix"
    inside, attention = path.rpartition(".")[0], False
    step = inside
    while step:
        if "attention" in type(modules[step]).__name__.lower():
            inside, attention = step, True
            break
        step = step.rpartition(".")[0]
    # Square weights do not show it; stock Conv1D stores input x output.
    transposed = kind == "matrix" and (shape == (width_in, width_out) != (width_out, width_in) or hasattr(module, "nf"))
    return Call(path, kind, width_in, width_out, inside, attention, transposed)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a normalisation, by its class."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def examine_norm(module: torch.nn.Module, width: int) -> Norm:
    """Kind, offset and epsilon of a norm, from what it computes on numbers; the epsilon's key is for the caller.

    Args:
        width: of its input, for norms without weights.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    by_name = Norm("layer" if "layernorm" in type(module).__name__.lower() else "rms", "")
    try:
        found = _computed_norm(copy.deepcopy(module).to_empty(device="cpu").float(), width)
    except (RuntimeError, TypeError, ValueError):  # a norm that wants more than one input: its class name must do
        found = by_name
    return replace(found, eps=float(eps)) if eps is not None else found


def _computed_norm(norm: torch.nn.Module, width: int) -> Norm:
    shape = next((tuple(each.shape) for name, each in norm.named_parameters() if name == "weight"), None)
    x = (
        torch.linspace(-1.0, 2.0, shape[-1] if shape else width)
        .square()
        .expand(1, 1, *(shape or (width,)))
        .contiguous()
    )
    with torch.no_grad():
        _fill(norm, 1.0)
        plain, shifted = norm(x), norm(x + 3.0)
        _fill(norm, 0.0)
        offset = float(shape is not None and bool(norm(x).abs().max() > 0))
    return Norm("layer" if torch.allclose(plain, shifted, atol=1e-3) else "rms", "", offset)


def _fill(module: torch.nn.Module, weight: float) -> None:
    for name, parameter in module.named_parameters():
        parameter.fill_(weight if name == "weight" else 0.0)
