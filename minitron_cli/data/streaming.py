"""Text that is read, tokenised and packed while training runs; what is read, and how, is as for `data prepare`.

Each pass takes the shards (files) in a seeded order and packs their documents, in order, into sequences; blocks of
sequences are shuffled. So the order depends on content and seed alone, and a place in it is five numbers: where its
block began (pass, shard, document, token) and how many sequences of it are used. To go back to a place is to read its
shard again up to there, and to tokenise at most one block again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import islice
from typing import Any

import numpy as np

from minitron_cli.config.data import DataConfig
from minitron_cli.data.blocks import Block, Packer, Place, packed
from minitron_cli.data.chat import ChatRenderer
from minitron_cli.data.documents import Document
from minitron_cli.data.sources import open_sources
from minitron_cli.data.tokenise import Encoded, Encoder, encode_all, thread_pool
from minitron_cli.errors import ConfigError, InputError, RunError, UserError
from minitron_cli.manifest import digest
from minitron_cli.models.tokenizer import load_tokenizer, vocabulary_size
from minitron_cli.runtime.ahead import Ahead
from minitron_cli.tokens import Sequences, Split, tokenizer_identity

BLOCK_TOKENS = 1 << 22
"""Tokens that are shuffled together, about. Three blocks are in memory, at 4 bytes per token (5 for chat)."""
BLOCK_SEQUENCES = 1024
"""A block has at least so many sequences, however long they are."""


class StreamedText:
    """One source of text, opened and checked, with the tokenizer of a checkpoint.

    `fingerprint` changes with all that decides the tokens; of a Hub data set only the name is known.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open `config.sources[0]`, and read until one sequence is full.

        Raises:
            UserError: as for `data prepare`; and text for less than one sequence.
        """
        tokenizer = load_tokenizer(config.tokenizer)
        chat = ChatRenderer(tokenizer, config.tokenizer) if config.messages is not None else None
        (self.source,) = open_sources(config)
        if self.source.weight is not None:
            raise ConfigError(
                f"{config.sources[0]}: weights mix the sources of `data prepare`; training reads one source."
            )
        self.name, self.seq_len, self.encoder = self.source.name, config.seq_len, Encoder(tokenizer, chat)
        self.vocab_size, self.tokenizer = vocabulary_size(tokenizer), tokenizer_identity(tokenizer)
        template = chat.template if chat is not None else None
        self.fingerprint = digest(
            [self.source.kind, self.source.identity, self.tokenizer, self.encoder.separator, template]
        )
        self.block_sequences = max(BLOCK_SEQUENCES, BLOCK_TOKENS // self.seq_len)
        self._require_sequence()

    def _require_sequence(self) -> None:
        found = 0
        with thread_pool(1) as (pool, ahead):
            for _, _, item in self._encoded(range(len(self.source.shards)), Place(), pool, ahead):
                found += len(item.ids)
                if found >= self.seq_len:
                    return
        if not found:
            what = "no conversation with an assistant turn" if self.encoder.chat is not None else "no text"
            raise InputError(f"{self.name}: {what} to train on.")
        raise InputError(
            f"{self.name}: {found} tokens are less than one sequence of {self.seq_len} (--seq-len); use more text or "
            "shorter sequences."
        )

    def first_sequences(self, count: int, *, kept: bool) -> Split | None:
        """The first sequences in the order of the source; reads on until there are `count` or the text ends.

        Args:
            kept: of the documents kept for validation, else of the others.

        Returns None if there is no whole one.
        """
        ids, masks, tokens, text_bytes = [], [], 0, 0
        documents = (document for document in self.source.documents() if document.validation == kept)
        with thread_pool(1) as (pool, ahead):
            for item in encode_all(documents, self.encoder, pool, ahead):
                ids.append(item.ids)
                masks += [] if item.mask is None else [item.mask]
                tokens, text_bytes = tokens + len(item.ids), text_bytes + item.text_bytes
                if tokens >= count * self.seq_len:
                    break
        rows = min(count, tokens // self.seq_len)
        if not rows:
            return None
        mask = packed(masks, rows, self.seq_len) if masks else None
        return Split(self.name, packed(ids, rows, self.seq_len), mask, text_bytes / tokens)

    def blocks(self, place: Place, seed: int) -> Generator[Block]:
        """Pass after pass from a place on, without end; the incomplete last sequence of a pass is dropped.

        Raises:
            UserError: a shard cannot be read.
        """
        with thread_pool(1) as (pool, ahead):
            while True:
                yield from self._pass(place, seed, pool, ahead)
                place = Place(place.turn + 1)

    def _pass(self, place: Place, seed: int, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Block]:
        """The blocks of one pass, from a place in it."""
        shards = len(self.source.shards)
        order = np.random.Generator(np.random.PCG64([seed, place.turn])).permutation(shards).tolist()
        packer = Packer(self.seq_len, seed, place)
        for shard, document, item in self._encoded(order, place, pool, ahead):
            packer.add(item)
            while packer.sequences >= self.block_sequences:
                rest = packer.tokens - self.block_sequences * self.seq_len
                following = Place(place.turn, shard, document, len(item.ids) - rest)
                yield packer.block(self.block_sequences, following)
        if packer.sequences:
            yield packer.block(packer.sequences, Place(place.turn + 1))
        elif packer.place == Place(place.turn):
            raise InputError(f"{self.name} gives less than one sequence now; it has changed.")

    def _encoded(
        self, order: Sequence[int], place: Place, pool: ThreadPoolExecutor, ahead: int
    ) -> Iterator[tuple[int, int, Encoded]]:
        """Training documents from a place of a pass on, with their numbers: shards done, document of the shard."""
        numbers: deque[tuple[int, int]] = deque()

        def documents() -> Iterator[Document]:
            for done in range(place.shard, len(order)):
                training = (document for document in self.source.shards[order[done]]() if not document.validation)
                first = place.document if done == place.shard else 0
                for number, document in enumerate(islice(training, first, None), first):
                    numbers.append((done, number))
                    yield document

        for item in encode_all(documents(), self.encoder, pool, ahead):
            yield *numbers.popleft(), item


class StreamedSource:
    """Batches of streamed text; a thread reads and tokenises the next block while one is used."""

    def __init__(self, text: StreamedText, seed: int, batch_size: int) -> None:
        self.text, self.name, self.seq_len = text, text.name, text.seq_len
        self.vocab_size, self.tokenizer = text.vocab_size, text.tokenizer
        self.length: int | None = None
        self._seed, self._batch_size = seed, batch_size
        self._step, self._place, self._used = 0, Place(), 0
        self._block: Block | None = None
        self._expected: int | None = None
        self._ahead: Ahead[Block] | None = None

    def batch(self, step: int) -> Sequences:
        """The next sequences.

        Raises:
            RunError: the source cannot be read on.
            InputError: it is not what it was when the state of `seek` was taken.
        """
        if step != self._step:
            raise ValueError(f"step {step} was asked for, and {self._step} is next")
        parts: list[Sequences] = []
        missing = self._batch_size
        while missing:
            block = self._current()
            parts.append(block[self._used : self._used + missing])
            self._used += len(parts[-1])
            missing -= len(parts[-1])
            if self._used == len(block):
                self._block, self._place, self._used = None, block.following, 0
        self._step += 1
        return Sequences(np.concatenate([p.ids for p in parts]), np.concatenate([p.targets for p in parts]))

    def _current(self) -> Block:
        if self._block is None:
            self._ahead = self._ahead or Ahead(self.text.blocks(self._place, self._seed))
            try:
                self._block = self._ahead.take()
            except UserError as error:  # the start was readable: there may be hours of work to keep
                raise RunError(f"The data cannot be read on; the last checkpoint is kept. {error}") from error
            if self._expected not in (None, self._block.checksum()):
                raise InputError(
                    f"{self.name} holds other text than when this run began; bring it back as it was, or add --force "
                    "to start anew."
                )
            self._expected = None
        return self._block

    def state(self) -> dict[str, Any]:
        """Where the current block began, how many of its sequences are used, and its checksum."""
        checksum = self._block.checksum() if self._block is not None else self._expected
        return {"place": list(astuple(self._place)), "used": self._used, "checksum": checksum}

    def seek(self, step: int, state: dict[str, Any]) -> None:
        """Start to read where `state` was taken."""
        self.close()
        self._step, self._place, self._used = step, Place(*state["place"]), state["used"]
        self._expected = state["checksum"]

    def close(self) -> None:
        """Stop the thread."""
        self._block = None
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
