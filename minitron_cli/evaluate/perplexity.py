"""Perplexity and bits per byte, without ever holding the logits of a whole batch.

Hidden states go through the model's own output head a few tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minitron_cli.errors import InputError, RunError
from minitron_cli.models.chunks import block_tokens, parts
from minitron_cli.models.head import Head, backbone_output
from minitron_cli.models.split import device_of
from minitron_cli.runtime.group import Group
from minitron_cli.runtime.progress import Progress
from minitron_cli.tokens import Split

CHUNK_ELEMENTS = 1 << 24
"""Logits computed at once; 64 MiB in fp32."""


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats per predicted token; `tokens` is how many were predicted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Cross-entropy in nats of every next token: ids (batch, seq) give (batch, seq - 1) in fp32."""
    return output_losses(model, backbone_output(model, input_ids), input_ids, chunk_elements=chunk_elements)


@torch.no_grad()
def output_losses(model: Any, output: Any, input_ids: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The same from the backbone's finished output, to which the model's head is applied."""
    head = Head(model, output)
    hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
    targets = input_ids[:, 1:].flatten()
    losses = torch.empty(len(targets), device=input_ids.device)
    block = block_tokens(head.vocab, input_ids.device)
    for chunk in parts(len(targets), max(1, chunk_elements // head.vocab)):
        logits, words, found = head(hidden[chunk]), targets[chunk], losses[chunk]
        for rows in parts(len(logits), block):
            found[rows] = cross_entropy(logits[rows], words[rows], reduction="none")
    return losses.view(input_ids.shape[0], -1)


def evaluate_split(
    model: Any,
    split: Split,
    *,
    batch_size: int,
    max_sequences: int | None = None,
    progress: Progress | None = None,
    losses_of: Callable[[range, Tensor], Tensor] | None = None,
    group: Group | None = None,
) -> Perplexity:
    """Predict every token of the first `max_sequences` sequences from those before it in the same sequence.

    Tokens that the split's mask excludes are context only. Sums are kept in fp64.

    Args:
        losses_of: rows of the split and their ids (batch, seq) to losses (batch, seq - 1), where the model cannot be
            run as a whole.
        group: processes that share the sequences; each must call this.

    Raises:
        InputError: no token is a target.
        RunError: the loss is not a finite number.
    """
    sequences = min(len(split), max_sequences or len(split))
    device, group = device_of(model), group or Group()
    nats, tokens = 0.0, 0
    for rows, counts in _shared(sequences, batch_size, group):
        targets = torch.from_numpy(split.targets(rows)[:, 1:])
        ids = torch.from_numpy(split.rows(rows)).to(device)
        losses = (token_losses(model, ids) if losses_of is None else losses_of(rows, ids)).cpu()
        if counts:
            nats += float(losses[targets].double().sum())
            tokens += int(targets.sum())
        if group.size == 1 and not math.isfinite(nats):
            raise RunError(f"The loss is {nats} on sequences {rows.start} to {rows.stop - 1}; try --dtype float32.")
        if progress is not None:
            progress.advance(len(rows), rated=targets.numel(), note=f"loss {nats / max(tokens, 1):.4f}")
    nats, predicted = group.sum_of(nats, tokens)
    tokens = int(predicted)
    if not math.isfinite(nats):
        raise RunError(f"The loss is {nats} on the {split.name} split; try --dtype float32.")
    if tokens == 0:
        raise InputError(f"No token of the {split.name} split is a target; prepare the data without an empty mask.")
    loss = nats / tokens
    bits = nats / math.log(2) / (tokens * split.bytes_per_token)
    return Perplexity(loss, math.exp(min(loss, 700.0)), bits, tokens)  # exp(710) would overflow


def _shared(sequences: int, batch_size: int, group: Group) -> Iterator[tuple[range, bool]]:
    """This process's batches, and whether each counts: all processes pass equally many, some of them for company."""
    batches = [range(start, min(start + batch_size, sequences)) for start in range(0, sequences, batch_size)]
    for first in range(0, len(batches), group.size):
        mine = first + group.rank
        yield (batches[mine], True) if mine < len(batches) else (batches[first], False)
