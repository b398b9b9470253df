"""Parts of a corpus on all cores: processes that report, stop when asked, and die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from minitron_cli.data.consent.audit import Auditor, PartCounts, Plan
from minitron_cli.data.consent.corpus import Part
from minitron_cli.errors import RunError

POLL_SECONDS = 0.25

_auditor: Auditor | None = None
_done: Any = None
_stop: Any = None


class Stopped(Exception):
    """The parent wants no more."""


def audit_parts(plan: Plan, parts: Sequence[Part], workers: int, advance: Callable[[int], None]) -> list[PartCounts]:
    """Audit every part; results are in the order of the parts, whatever the number of processes.

    Raises:
        UserError: a part cannot be read.
        RunError: a process died.
    """
    if workers <= 1 or len(parts) <= 1:
        auditor = Auditor(plan)
        return [auditor.audit(part, advance) for part in parts]
    context = multiprocessing.get_context("spawn")  # forking a process whose libraries run threads may hang
    done, stop = context.Value("q", 0), context.Event()
    workers = min(workers, len(parts))
    pool = ProcessPoolExecutor(workers, context, _start, (plan, done, stop))
    try:
        return _collect([pool.submit(_audit, part) for part in parts], done, advance)
    except BrokenProcessPool:
        raise RunError("A process of the audit died (out of memory?); use fewer --workers and run again.") from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)  # nobody writes any more when the caller cleans up


def _collect(futures: list[Future[PartCounts]], done: Any, advance: Callable[[int], None]) -> list[PartCounts]:
    shown, waiting = 0, set(futures)
    while waiting:
        ready, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        count = done.value
        advance(count - shown)
        shown = count
        for future in ready:
            future.result()  # raises what the part raised
    return [future.result() for future in futures]


def _start(plan: Plan, done: Any, stop: Any) -> None:
    global _auditor, _done, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and tells us
    threading.Thread(target=_follow_parent, daemon=True).start()
    _auditor, _done, _stop = Auditor(plan), done, stop


def _follow_parent() -> None:
    """A killed parent cannot tell anybody; what nobody waits for must not go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _audit(part: Part) -> PartCounts:
    assert _auditor is not None

    def advance(rows: int) -> None:
        if _stop.is_set():
            raise Stopped
        with _done.get_lock():
            _done.value += rows

    return _auditor.audit(part, advance)
