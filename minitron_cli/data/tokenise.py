"""Documents to token ids on several threads, in order, a bounded number ahead.

The Rust tokenizers release Python's lock while they work, so threads scale like processes and need no pickling, no
start-up and no second copy of the vocabulary.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.data.chat import ChatRenderer
from minitron_cli.data.documents import Document
from minitron_cli.errors import ConfigError
from minitron_cli.models.tokenizer import separator_id

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256
"""A batch, one unit of work, ends at either: a fraction of a second, so that a limit wastes little."""

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Encoded:
    """A document as tokens, separator first: `ids` (n,), `mask` (n,) or None, UTF-8 bytes of the text, input bytes."""

    ids: Ids
    mask: npt.NDArray[np.uint8] | None
    validation: bool
    text_bytes: int
    read: int


class Encoder:
    """Turns documents into tokens exactly as the tokenizer would, without the special tokens it might add itself."""

    def __init__(self, tokenizer: Any, chat: ChatRenderer | None = None) -> None:
        """Take what is needed from the tokenizer.

        Raises:
            ConfigError: chat data with a tokenizer that cannot say which characters a token covers.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.backend = None
        if backend is not None:
            # A copy: truncation and padding that the file asks for are for single prompts, and the caller's stay put.
            self.backend = type(backend).from_str(backend.to_str())
            self.backend.no_truncation()
            self.backend.no_padding()
        elif chat is not None:
            raise ConfigError("--messages needs a tokenizer of the tokenizers library (tokenizer.json).")
        self.tokenizer, self.chat = tokenizer, chat
        self.separator = separator_id(tokenizer)
        if chat is not None and getattr(tokenizer, "bos_token_id", None) is None:
            self.separator = None  # such templates delimit turns by themselves; an end token first would be noise
        self._lock = Lock()

    def encode(self, batch: list[Document]) -> list[Encoded]:
        """One batch; called from several threads at once."""
        if self.chat is not None:
            return [self._conversation(document) for document in batch]
        texts = [document.text for document in batch]
        if self.backend is not None:
            rows = [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            with self._lock:  # pure Python tokenizers promise nothing about threads
                rows = [self.tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
        return [self._encoded(document, document.text, ids) for document, ids in zip(batch, rows, strict=True)]

    def _encoded(self, document: Document, text: str, ids: list[int], mask: list[int] | None = None) -> Encoded:
        first = [] if self.separator is None or (mask is not None and ids[:1] == [self.separator]) else [self.separator]
        tokens = np.array(first + ids, np.uint32)
        targets = None if mask is None else np.array([0] * len(first) + mask, np.uint8)
        return Encoded(tokens, targets, document.validation, len(text.encode("utf-8")), document.read)

    def _conversation(self, document: Document) -> Encoded:
        assert self.chat is not None and self.backend is not None
        with self._lock:  # templates set state on the shared tokenizer
            text, spans = self.chat.render(document.messages or [], document.where)
        encoding = self.backend.encode(text, add_special_tokens=False)
        mask = _token_mask(encoding.offsets, spans, len(text))
        return self._encoded(document, text, list(encoding.ids), mask)


def _token_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], characters: int) -> list[int]:
    """1 for each token that covers a character of a span.

    A token may begin with the blank before the answer, and one that covers no character of its own (the rest of a
    character's bytes) starts at the character it belongs to: both belong to the answer.
    """
    before = np.zeros(characters + 2, np.int64)  # before[i]: chosen characters left of i
    for start, end in spans:
        before[start + 1 : end + 1] = 1
    before = np.cumsum(before)
    return [int(before[min(max(end, start + 1), characters)] > before[start]) for start, end in offsets]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that a batch holds about 256 kB; depends on the documents alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    documents: Iterable[Document], encoder: Encoder, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Encoded]:
    """Documents in their order, tokenised on the pool with at most `ahead` batches under way or waiting."""
    waiting: deque[Future[list[Encoded]]] = deque()
    for batch in batches(documents):
        waiting.append(pool.submit(encoder.encode, batch))
        if len(waiting) >= ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def thread_pool(workers: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool of `workers` threads (0: one per usable core) and the number of batches to keep ahead.

    The tokenizers library gets no threads of its own meanwhile: `workers` then is the number of busy cores, and later
    forks of this process draw no warning from it.
    """
    workers = workers or _cores()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        yield pool, 2 * workers
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
