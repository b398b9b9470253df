"""Progress of reading: by tokens where a limit is set, by bytes where the sources have a size, else a plain count."""

from __future__ import annotations

import time

from minitron_cli.data.tokenise import Encoded
from minitron_cli.runtime.progress import Progress, quantity


class Meter(Progress):
    """A progress line whose rate is tokens per second and whose note is the documents done."""

    def __init__(self, total_bytes: int, max_tokens: int | None) -> None:
        """`total_bytes`: size of all sources, 0 if unknown. `max_tokens`: end of the train split, tokens."""
        self.by_tokens = max_tokens is not None
        self.documents = self.bytes_read = 0
        unit = "tokens" if self.by_tokens else "kB"
        super().__init__("data", max_tokens or total_bytes // 1000, unit, rate_unit="tokens")

    def count(self, item: Encoded, train_tokens: int) -> None:
        """One more document; `train_tokens` is the size of the train split after it."""
        self.documents += 1
        self.bytes_read += item.read or item.text_bytes
        done = train_tokens if self.by_tokens else self.bytes_read // 1000
        self.advance(done - self.done, rated=len(item.ids), note=f"{quantity(self.documents)} documents")

    def line(self) -> str:
        """Without a total there is no share and no time left."""
        if self.total:
            return super().line()
        rate = quantity(self.rated / max(time.monotonic() - self.began, 1e-9))
        return f"{self.title}  {self.done} {self.unit}  {rate} {self.rate_unit}/s  {self.note}"

    def close(self) -> None:
        """Bytes of markup and skipped files are not counted, so the end is where the count stands."""
        if not self.by_tokens:
            self.total = self.done
        super().close()
