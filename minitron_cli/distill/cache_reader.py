"""Lessons from a cache, read ahead in the background; what is read never depends on the timing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from minitron_cli.distill.cache import TeacherCache
from minitron_cli.distill.losses import TopK
from minitron_cli.distill.trainer import Batch

AHEAD_BYTES = 64 << 20
"""Memory for answers read ahead: four batches like the last, or what fits; one, whatever its size."""


class CachedTeacher:
    """The teacher's answers for sequences of a prepared data set, as `Teacher` gives them for a live one."""

    def __init__(self, cache: TeacherCache, visits: npt.NDArray[np.int64], device: torch.device) -> None:
        """Args:
        visits: rows in the order in which lessons will be asked for; another order only costs waiting.
        """
        self.cache, self.device = cache, device
        self._visits = visits
        self._last: tuple[int, ...] = ()
        self._next = 0
        self._ahead: dict[int, Future[TopK]] = {}
        self._reader = ThreadPoolExecutor(1, "cached-teacher")

    def lesson(self, batch: Batch) -> TopK:
        """The answers at the batch's targets, (targets, k)."""
        place = self._find(batch.rows)
        reading = [self._ahead.pop(place + number, None) for number in range(len(batch.rows))]
        found = [
            answer.result() if answer is not None else self._read(row)
            for row, answer in zip(batch.rows, reading, strict=True)
        ]
        self._last, self._next = batch.rows, place + len(batch.rows)
        self._read_ahead(found)
        top = TopK(
            torch.cat([one.ids for one in found]).to(self.device),
            torch.cat([one.log_probs for one in found]).to(self.device),
            torch.cat([one.log_tail for one in found]).to(self.device),
            self.cache.content.vocab,
        )
        assert len(top.ids) == int(batch.targets.sum()), "the cache and the data have the same targets"
        return top

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(cancel_futures=True)
        self.cache.close()

    def _read(self, row: int) -> TopK:
        return self.cache.record.decode(self.cache.records(row))

    def _find(self, rows: Sequence[int]) -> int:
        """Where in the order of visits these rows are: after the last ones, or, after a resume, where they occur."""
        if np.array_equal(self._visits[self._next : self._next + len(rows)], rows):
            return self._next
        for known in (self._last, ()):  # two batches together are where they are, one may be elsewhere in another pass
            wanted = np.array([*known, *rows])
            for start in np.flatnonzero(self._visits == wanted[0]).tolist():
                if np.array_equal(self._visits[start : start + len(wanted)], wanted):
                    return int(start) + len(known)
        return len(self._visits)

    def _read_ahead(self, last: Sequence[TopK]) -> None:
        """Start reading what comes next; forget what is not next."""
        size = max(1, sum(one.ids.numel() * 12 for one in last) // max(1, len(last)))
        count = max(len(last), min(4 * len(last), AHEAD_BYTES // size))
        coming = range(self._next, min(self._next + count, len(self._visits)))
        for place in [place for place in self._ahead if place not in coming]:
            self._ahead.pop(place).cancel()
        for place in coming:
            if place not in self._ahead:
                self._ahead[place] = self._reader.submit(self._read, int(self._visits[place]))
