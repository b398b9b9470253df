"""Ctrl-C and SIGTERM between steps: the running step ends first, so that its work can be saved.

Several processes stop after the same step, whichever of them hear the signal and when.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from minitron_cli.runtime.group import Group
from minitron_cli.runtime.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """One of the signals came; whoever catches it saves, then lets it act with `again`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def again(self) -> None:
        """Deliver the signal to whoever handled it before."""
        signal.raise_signal(self.number)


class Interrupts:
    """While this context is open, signals raise Interrupted: at once, or after the block that is `shielded`.

    A second signal acts as if nobody held it back. In threads other than the main one, nothing is changed. With several
    processes a signal always waits for the end of the next shielded block, which all of them come to.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group or Group()
        self._before: dict[int, Any] = {}
        self._shielded = False
        self._pending: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Hold signals back until the block ends."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._group.any(self._pending is not None):
            raise Interrupted(self._pending or signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._group.size > 1:
            self._pending = self._pending or number
            say("Stopping all processes after this step and its checkpoint.")
            return
        self._restore()
        if not self._shielded:
            raise Interrupted(number)
        self._pending = number
        say("Stopping after this step and its checkpoint; once more stops at once.")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
