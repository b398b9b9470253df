"""An iterator that works in a thread of its own, a bounded number of items ahead of whoever takes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Items of a generator in their order; `depth` of them wait at most, and one more is in the making."""

    def __init__(self, items: Generator[Item], depth: int = 1) -> None:
        self._items = items
        self._waiting: queue.Queue[tuple[Item] | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        # A daemon: a process that ends by a signal does not wait for it.
        self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next item; waits until there is one.

        Raises:
            EOFError: there are no more.
            Exception: whatever the generator raised.
        """
        found = self._waiting.get()
        if isinstance(found, BaseException):
            self._waiting.put(found)  # whoever asks again hears the same
            raise found
        return found[0]

    def close(self) -> None:
        """Stop; an item in the making is finished and dropped."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._offer((item,)):
                    break
            else:
                self._offer(EOFError("no more items"))
        except BaseException as error:
            self._offer(error)
        finally:
            self._items.close()

    def _offer(self, found: tuple[Item] | BaseException) -> bool:
        """Wait for room; False where nobody wants it any more."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._waiting.put(found, timeout=0.1)
                return True
        return False
