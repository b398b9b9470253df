"""What perplexity is measured on: a prepared data set or text as it is, whole sequences or windows with a stride."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_cli.config.data import DataConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.data.sources import Source, open_sources
from minitron_cli.data.tokenise import Encoder
from minitron_cli.evaluate.batches import sequences_at_once
from minitron_cli.evaluate.perplexity import Perplexity, evaluate_split
from minitron_cli.evaluate.windows import Window, evaluate_windows, windows
from minitron_cli.manifest import digest, fingerprint
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.tokens import Split, TokenDataset

RAW_WINDOW = 2048
"""Tokens of a window over raw text, at most, where --window says nothing."""


@dataclass(frozen=True)
class Reading:
    """The text of a perplexity, opened and checked: one split of a prepared data set, or sources of raw text."""

    config: EvalConfig
    split: Split | None
    sources: list[Source]

    def fingerprint(self) -> str:
        """Changes when the text does."""
        if self.config.data is not None:
            return fingerprint(self.config.data)
        return digest([[source.name, source.identity] for source in self.sources])

    def measure(self, model: Any, tokenizer: Any) -> Perplexity:
        """Perplexity of one model.

        Raises:
            InputError: no token is a target, or a file is not what its name says.
            RunError: the loss is not a finite number.
        """
        length = self._length(model)
        batch = sequences_at_once(model, length, self.config.batch_size)
        if self.split is not None and self.config.window is None and self.config.stride is None:
            return self._sequences(model, self.split, batch)
        found = self._packed(self.split, length) if self.split is not None else self._raw(tokenizer, length)
        total = self._windows(length)
        with Progress("perplexity", total or 0, "windows", rate_unit="windows") as progress:
            return evaluate_windows(
                model, found, batch_size=batch, most=self.config.max_sequences,
                advance=lambda count, loss: progress.advance(count, note=f"loss {loss:.4f}"),
            )  # fmt: skip

    def _length(self, model: Any) -> int:
        """Tokens the model sees at once; says where that is more than it was made for."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = self.config.window or (self.split.tokens.shape[1] if self.split is not None else RAW_WINDOW)
        if self.split is None and self.config.window is None:
            return int(min(length, context or length))
        if context and length > context:
            say(f"Sequences have {length} tokens and the model was made for {context}: expect a high perplexity.")
        return int(length)

    def _windows(self, length: int) -> int | None:
        """How many there will be, where that is known before the text is read."""
        if self.split is None:
            return self.config.max_sequences
        step = min(self.config.stride or length - 1, length - 1)
        every = 1 + max(0, -(-(self.split.tokens.size - length) // step))
        return min(every, self.config.max_sequences or every)

    def _sequences(self, model: Any, split: Split, batch: int) -> Perplexity:
        sequences = min(len(split), self.config.max_sequences or len(split))
        with Progress("perplexity", sequences, "sequences", rate_unit="tokens") as progress:
            return evaluate_split(
                model, split, batch_size=batch, max_sequences=self.config.max_sequences, progress=progress
            )

    def _packed(self, split: Split, size: int) -> Iterator[Window]:
        """Windows over the split's rows one after another, which are one stream."""
        mask = None if split.mask is None else split.mask.reshape(-1).astype(np.bool_)
        stream = split.tokens.reshape(-1)
        return windows(stream, size=size, stride=self.config.stride, bytes_per_target=split.bytes_per_token, mask=mask)

    def _raw(self, tokenizer: Any, size: int) -> Iterator[Window]:
        """Windows over each document (a file, or a row), whose first token follows the tokenizer's separator."""
        encoder = Encoder(tokenizer)
        for source in self.sources:
            for document in source.documents():
                (encoded,) = encoder.encode([document])
                each = encoded.text_bytes / max(len(encoded.ids) - 1, 1)
                yield from windows(encoded.ids, size=size, stride=self.config.stride, bytes_per_target=each)


def open_reading(config: EvalConfig) -> Reading | None:
    """The text that --data or --text names, checked; None without either.

    Raises:
        UserError: a path, a column, or a data set of another tokenizer.
    """
    if config.data is not None:
        data = TokenDataset(config.data)
        require_same_tokenizer(data, {"the checkpoint": config.checkpoint} | {name: name for name in config.against})
        return Reading(config, data.split(config.data_split), [])
    if not config.text:
        return None
    plain = DataConfig(
        sources=config.text, tokenizer=config.checkpoint, out=Path("unused.eval"), text_column=config.text_column,
        validation=0.0, split_documents="file",
    )  # fmt: skip
    return Reading(config, None, open_sources(plain))
