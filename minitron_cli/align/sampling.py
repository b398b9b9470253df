"""Batched sampling with a KV cache, and log-probabilities of what was sampled.

Samples are drawn at temperature 1 from the whole distribution: truncation or another temperature would make them
samples of another policy than the one whose log-probabilities the gradient needs. Each response has random numbers of
its own, so what is drawn depends on its seed and place, not on who shares the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    `batch`: responses generated at once; `dtype`: what autocast computes in, where not fp32.
    """

    stops: Tensor
    words: int
    max_new_tokens: int
    batch: int
    dtype: torch.dtype = torch.float32

    def sample(
        self, model: Any, prompts: Sequence[Sequence[int]], count: int, *seed: int, part: slice = slice(None)
    ) -> Responses:
        """`count` responses to each prompt: rows are prompt 0, prompt 0, ..., prompt 1, ...; a function of the seed.

        Args:
            seed: whole numbers that tell this draw from every other.
            part: of the prompts, to which alone responses are drawn: the same ones as if it were to all.
        """
        chances = np.random.Generator(np.random.PCG64(list(seed))).random((len(prompts), count, self.max_new_tokens))
        prompts, chances = prompts[part], chances[part]
        each = min(count, self.batch)
        together = self.batch // each
        parts = []
        with _evaluating(model):
            for first in range(0, len(prompts), together):
                some = slice(first, first + together)
                for start in range(0, count, each):
                    drawn = torch.from_numpy(chances[some, start : start + each])
                    parts.append(self._continue(model, prompts[some], drawn))
        return Responses.join(parts)

    @torch.no_grad()
    def _continue(self, model: Any, prompts: Sequence[Sequence[int]], chances: Tensor) -> Responses:
        """One batch: each prompt once, then its responses token after token, without those that have ended.

        Args:
            chances: (prompts, responses, tokens), numbers that decide each word.
        """
        device = next(model.parameters()).device
        count, positioned = chances.shape[1], takes_positions(model)
        ids, real = left_padded(prompts, device)
        start, chances, stops = ids.shape[1], chances.flatten(0, 1).to(_exact(device)), self.stops.to(device)

        def next_logits(fresh: Tensor, seen: Tensor, cache: Any) -> tuple[Tensor, Any]:
            given = {"position_ids": positions(seen)[:, -fresh.shape[1] :]} if positioned else {}
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = model(
                    input_ids=fresh, attention_mask=seen.long(), past_key_values=cache, use_cache=True,
                    logits_to_keep=1, **given,
                )  # fmt: skip
            return output.logits[:, -1, : self.words], output.past_key_values

        logits, cache = next_logits(ids, real, None)
        if count > 1:
            cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(count))
            logits, ids, real = (each.repeat_interleave(count, 0) for each in (logits, ids, real))
        going = torch.arange(len(ids), device=device)  # rows that have not ended
        kept = going  # rows in the cache, some of which may have ended
        for step in range(self.max_new_tokens):
            place = torch.searchsorted(kept, going)
            drawn = draw(logits[place], chances[going.to(chances.device), step]).to(device)
            ids, real = (torch.nn.functional.pad(each, (0, 1)) for each in (ids, real))
            ids[going, -1], real[going, -1] = drawn, True
            going = going[~stops[drawn]]
            if not len(going) or step + 1 == self.max_new_tokens:
                break
            if 2 * len(going) <= len(kept):
                cache.reorder_cache(torch.searchsorted(kept, going))
                kept = going
            logits, cache = next_logits(ids[kept, -1:], real[kept], cache)
        return Responses(ids, real, start)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Training classes that recompute activations would drop the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """The word of each row where the cumulative distribution passes a number in [0, 1).

    In float64: over a large vocabulary, sums in fp32 would move words by more than the tail holds.
    """
    exact = _exact(logits.device)
    rows = max(1, LOGITS // logits.shape[-1])
    parts = []
    for some, chance in zip(torch.split(logits, rows), torch.split(chances, rows), strict=True):
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
    for states, some in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
        # Kept logits of all chunks would be as many as of the whole batch.
        again = len(hidden) > size and torch.is_grad_enabled()
        parts.append(checkpoint(chosen, states, some, use_reentrant=False) if again else chosen(states, some))
    sums = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    rows = written.nonzero()[:, 0]
    return sums.index_add(0, rows, torch.cat(parts).float())
