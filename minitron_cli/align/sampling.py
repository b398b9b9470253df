"""Batched sampling with a KV cache, and log-probabilities of what was sampled.

Samples are drawn at temperature 1 from the whole distribution: truncation or another temperature would make them samples
of another policy than the one whose log-probabilities the gradient needs. Each response has random numbers of its own, so
what is drawn depends on its seed and place, not on who shares the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitron_cli.models.head import Head, backbone_of

LOGITS = 1 << 23
"""Elements of (tokens, words) that are formed at once."""


@dataclass(frozen=True)
class Responses:
    """Prompts, each with a sampled continuation; prompts end in one column, so the shorter begin after padding.

    `ids` (batch, columns); `real` (batch, columns) bool, false on padding; `start`: first column of the responses.
    """

    ids: Tensor
    real: Tensor
    start: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | list[int] | Tensor) -> Responses:
        """Some of them, without columns that are padding in all."""
        ids, real = self.ids[rows], self.real[rows]
        used = real.any(0).nonzero().flatten()
        first, last = int(used[0]), int(used[-1]) + 1
        return Responses(ids[:, first:last], real[:, first:last], self.start - first)

    @property
    def written(self) -> Tensor:
        """Where responses are: (batch, columns) bool, tokens that end them included."""
        written = self.real.clone()
        written[:, : self.start] = False
        return written

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, (batch,)."""
        return self.written.sum(1)

    def tokens(self) -> list[list[int]]:
        """The responses' ids, by row."""
        return [row[kept].tolist() for row, kept in zip(self.ids.cpu(), self.written.cpu(), strict=True)]

    @staticmethod
    def join(parts: Sequence[Responses]) -> Responses:
        """All rows of several, in order."""
        start = max(part.start for part in parts)
        after = max(part.ids.shape[1] - part.start for part in parts)
        padded = [part._padded(start - part.start, after - part.ids.shape[1] + part.start) for part in parts]
        return Responses(torch.cat([p.ids for p in padded]), torch.cat([p.real for p in padded]), start)

    def _padded(self, left: int, right: int) -> Responses:
        pad = torch.nn.functional.pad
        return replace(
            self, ids=pad(self.ids, (left, right)), real=pad(self.real, (left, right)), start=self.start + left
        )


@dataclass(frozen=True)
class Sampler:
    """How responses are drawn.

    `stops` (words,) bool: tokens that end a response; `words`: the vocabulary that is drawn from, the first ids;
    `batch`: responses generated at once.
    """

    stops: Tensor
    words: int
    max_new_tokens: int
    batch: int

    def sample(self, model: Any, prompts: Sequence[Sequence[int]], count: int, *seed: int) -> Responses:
        """`count` responses to each prompt: rows are prompt 0, prompt 0, ..., prompt 1, ...; a function of the seed.

        Args:
            seed: whole numbers that tell this draw from every other.
        """
        rows = [prompt for prompt in prompts for _ in range(count)]
        chances = np.random.Generator(np.random.PCG64(list(seed))).random((len(rows), self.max_new_tokens))
        was_training = model.training
        model.eval()
        try:
            parts = [
                self._continue(model, rows[start : start + self.batch], torch.from_numpy(chances[start:][: self.batch]))
                for start in range(0, len(rows), self.batch)
            ]
        finally:
            model.train(was_training)
        return Responses.join(parts)

    @torch.no_grad()
    def _continue(self, model: Any, prompts: Sequence[Sequence[int]], chances: Tensor) -> Responses:
        """One batch: the prompts at once, then token after token until all have ended."""
        device = next(model.parameters()).device
        ids, real = left_padded(prompts, device)
        start, chances, stops = ids.shape[1], chances.to(_exact(device)), self.stops.to(device)
        going = torch.ones(len(ids), dtype=torch.bool, device=device)
        cache, fresh = None, ids
        for step in range(self.max_new_tokens):
            given = {"position_ids": positions(real)[:, -fresh.shape[1] :]} if takes_positions(model) else {}
            output = model(
                input_ids=fresh, attention_mask=real.long(), past_key_values=cache, use_cache=True, logits_to_keep=1,
                **given,
            )  # fmt: skip
            cache = output.past_key_values
            drawn = draw(output.logits[:, -1, : self.words], chances[:, step]).to(device)
            fresh = torch.where(going, drawn, 0)[:, None]
            ids, real = torch.cat([ids, fresh], 1), torch.cat([real, going[:, None]], 1)
            going = going & ~stops[drawn]
            if not going.any():
                break
        return Responses(ids, real, start)


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """The word of each row where the cumulative distribution passes a number in [0, 1).

    In float64: over a large vocabulary, sums in fp32 would move words by more than the tail holds.
    """
    exact = _exact(logits.device)
    rows = max(1, LOGITS // logits.shape[-1])
    parts = []
    for some, chance in zip(logits.split(rows), chances.split(rows), strict=True):
        summed = torch.softmax(some.to(exact).double(), -1).cumsum(-1)
        parts.append(torch.searchsorted(summed, (chance.to(exact) * summed[:, -1])[:, None], right=True)[:, 0])
    return torch.cat(parts).clamp_max(logits.shape[-1] - 1)


def _exact(device: torch.device) -> torch.device:
    """Where float64 exists: not on MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (batch, longest) with zeros before shorter prompts, and where they are real."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    real = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        real[row, width - len(prompt) :] = True
    return ids.to(device), real.to(device)


def positions(real: Tensor) -> Tensor:
    """Places of tokens in their own sequence, from 0, whatever padding stands before them."""
    return (real.long().cumsum(-1) - 1).clamp_min(0)


def takes_positions(model: Any) -> bool:
    """Whether the stock class is told positions; the others find them from the attention mask."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def log_probs(model: Any, responses: Responses, words: int) -> Tensor:
    """log p(response | prompt) in nats, (batch,) in fp32: a sum over the response's tokens; gradients flow."""
    ids, real = responses.ids, responses.real
    given = {"position_ids": positions(real)} if takes_positions(model) else {}
    output = backbone_of(model)(input_ids=ids, attention_mask=real.long(), use_cache=False, **given)
    written = responses.written[:, 1:]
    hidden, targets = output.last_hidden_state[:, :-1][written], ids[:, 1:][written]
    head = Head(model, output)

    def chosen(states: Tensor, words_chosen: Tensor) -> Tensor:
        logits = head(states)[:, :words]
        return logits.gather(1, words_chosen[:, None])[:, 0] - logits.logsumexp(1)

    size = max(1, LOGITS // head.vocab)
    parts = []
    for states, some in zip(hidden.split(size), targets.split(size), strict=True):
        # Kept logits of all chunks would be as many as of the whole batch.
        again = len(hidden) > size and torch.is_grad_enabled()
        parts.append(checkpoint(chosen, states, some, use_reentrant=False) if again else chosen(states, some))
    sums = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    rows = written.nonzero()[:, 0]
    return sums.index_add(0, rows, torch.cat(parts).float())
