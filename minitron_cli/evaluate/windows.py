"""Perplexity of a stream longer than the model's context, by windows that move on a stride at a time.

A window predicts what the windows before it have not: with a stride of half a window each token but the first ones has
at least half a window before it (Hugging Face's "perplexity of fixed-length models"; the harness's rolling windows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitron_cli.errors import InputError, RunError
from minitron_cli.evaluate.perplexity import Perplexity, token_losses

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Window:
    """Tokens seen at once, (length,), which of them are predicted here, (length,), and the `bytes` of text of these."""

    ids: Ids
    targets: npt.NDArray[np.bool_]
    bytes: float


def windows(
    ids: Ids, *, size: int, stride: int | None, bytes_per_target: float, mask: npt.NDArray[np.bool_] | None = None
) -> Iterator[Window]:
    """Windows over one stream (tokens,), of which every token but the first is predicted once.

    Args:
        size: tokens of a window, at most.
        stride: tokens that the next window predicts, at most `size` - 1, which is the default.
        mask: (tokens,); tokens that count; the others are context only.
    """
    step, reached = min(stride or size - 1, size - 1), 1
    while reached < len(ids):
        end = min(size if reached == 1 else reached + step, len(ids))
        begin = max(end - size, 0)
        targets = np.zeros(end - begin, np.bool_)
        targets[reached - begin :] = True if mask is None else mask[reached:end]
        yield Window(ids[begin:end], targets, int(targets.sum()) * bytes_per_target)
        reached = end


def evaluate_windows(
    model: Any,
    found: Iterable[Window],
    *,
    batch_size: int,
    most: int | None = None,
    advance: Callable[[int, float], None] = lambda windows, loss: None,
) -> Perplexity:
    """Predict the targets of all windows, or of the first `most`. Sums are kept in fp64.

    Raises:
        InputError: no token is a target.
        RunError: the loss is not a finite number.
    """
    device = next(model.parameters()).device
    nats, tokens, size = 0.0, 0, 0.0
    left = islice(found, most)
    while batch := list(islice(left, batch_size)):
        ids, targets = _padded(batch)
        losses = token_losses(model, ids.to(device)).cpu()
        nats += float(losses[targets[:, 1:]].double().sum())
        tokens += int(targets.sum())
        size += sum(window.bytes for window in batch)
        if not math.isfinite(nats):
            raise RunError(f"The loss is {nats} after {tokens:,} tokens; try --dtype float32.")
        advance(len(batch), nats / max(tokens, 1))
    if tokens == 0:
        raise InputError("No token of the text is a target: it is empty, or its mask excludes everything.")
    loss = nats / tokens
    return Perplexity(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / size, tokens)


def _padded(batch: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets (windows, longest); padded right, which nothing sees: the models are causal."""
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.from_numpy(window.ids.astype(np.int64))
        targets[row, : len(window.ids)] = torch.from_numpy(window.targets)
    return ids, targets
