"""The polite client behind `data robots fetch`: one request per host at a time, a pause between two, further tries."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from minitron_cli import __version__
from minitron_cli.config.audit import RobotsFetchConfig
from minitron_cli.data.consent.store import BODY_LIMIT, KEPT_HEADERS, ROBOTS, TDMREP, Capture, StoreWriter
from minitron_cli.data.consent.urls import authority_of, host_of
from minitron_cli.runtime.progress import Progress

PATHS = {ROBOTS: "/robots.txt", TDMREP: "/.well-known/tdmrep.json"}
REDIRECTS = 10
"""Followed at most; RFC 9309 asks for five."""

BACKOFF_SECONDS, LONGEST_WAIT = 2.0, 60.0
"""Pause before the first further try, doubled for each; and the most that a Retry-After is obeyed for."""

FLUSH_SECONDS = 30.0
"""What a kill may lose."""

HOSTS = 100_000
"""Hosts whose time of the next turn is remembered."""


def run_until_signal(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` that SIGTERM ends as Ctrl-C does: the work is cancelled, then the caller's handler is called.

    A handler that raises inside the loop would be taken for an error of whatever callback it happens to interrupt.
    """
    before, stopped = signal.getsignal(signal.SIGTERM), False

    async def main() -> None:
        task = asyncio.current_task()

        def stop() -> None:
            nonlocal stopped
            stopped = True
            if task is not None:
                task.cancel()

        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        await work

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if not stopped:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if stopped:
        signal.raise_signal(signal.SIGTERM)


def is_failure(status: int) -> bool:
    """Whether another try may end otherwise: no answer, too many requests, an error of the server."""
    return status == 0 or status == 429 or status >= 500


class Fetcher:
    """The requests of one run."""

    def __init__(self, config: RobotsFetchConfig) -> None:
        self.config = config
        contact = f"; {config.contact}" if config.contact else ""
        self.user_agent = f"minitron/{__version__} (robots.txt consent audit{contact})"
        self.status: dict[str, int] = {}
        self.done = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._turns: dict[str, float] = {}

    async def run(self, todo: list[tuple[str, str]], writer: StoreWriter) -> None:
        """Make all requests and add their captures; `concurrency` of them at once."""
        config = self.config
        # Names are looked up in threads; the default of a few threads would be the limit.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(min(config.concurrency, 128)))
        connector = aiohttp.TCPConnector(limit=config.concurrency, limit_per_host=1, force_close=True)
        timeout = aiohttp.ClientTimeout(total=config.timeout)
        waiting = iter(_spread(todo))
        with Progress("fetch", len(todo), "files") as progress:
            async with aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers={"User-Agent": self.user_agent, "Accept": "*/*"},
                cookie_jar=aiohttp.DummyCookieJar(), max_line_size=1 << 16, max_field_size=1 << 16,
            ) as session:  # fmt: skip
                flushed = time.monotonic()

                async def work() -> None:
                    nonlocal flushed
                    for authority, kind in waiting:
                        capture = await self.capture(session, authority, kind)
                        writer.add(capture)
                        self._count(capture, progress)
                        if time.monotonic() - flushed > FLUSH_SECONDS:
                            flushed = time.monotonic()
                            writer.flush()

                async with asyncio.TaskGroup() as group:
                    for _ in range(min(config.concurrency, len(todo))):
                        group.create_task(work())

    def _count(self, capture: Capture, progress: Progress) -> None:
        name = f"{capture.status // 100}xx" if capture.status else "none"
        self.status[name] = self.status.get(name, 0) + 1
        self.done += 1
        progress.advance(note=", ".join(f"{count} {kind}" for kind, count in sorted(self.status.items())))

    async def capture(self, session: aiohttp.ClientSession, authority: str, kind: str = ROBOTS) -> Capture:
        """What the authority answers in the end, after further tries where it fails."""
        for attempt in range(self.config.retries + 1):
            found, pause = await self._try(session, authority, kind)
            if not is_failure(found.status) or attempt == self.config.retries:
                break
            wait = max(BACKOFF_SECONDS * 2**attempt * random.uniform(0.75, 1.25), pause)
            await asyncio.sleep(min(wait, LONGEST_WAIT))
        return found

    async def _try(self, session: aiohttp.ClientSession, authority: str, kind: str) -> tuple[Capture, float]:
        """One try with its redirects; and how many seconds the server asked to wait."""
        url, seen = authority + PATHS[kind], set[str]()
        at = int(time.time())
        status, note = 0, ""
        try:
            for _ in range(REDIRECTS + 1):
                if url in seen:
                    return Capture(authority, at, status, kind=kind, note=f"redirects in a circle at {url}"), 0.0
                seen.add(url)
                async with self._turn(url), session.get(URL(url, encoded=True), allow_redirects=False) as response:
                    status = response.status
                    location = response.headers.get("Location", "")
                    if status not in (301, 302, 303, 307, 308) or not location:
                        body = await _body(response) if 200 <= status < 300 else b""
                        note = f"redirected to {url}" if len(seen) > 1 else ""
                        pause = _seconds(response.headers.get("Retry-After", ""))
                        return Capture(authority, at, status, body, _headers(response), kind, note), pause
                url = urljoin(url, location).partition("#")[0]
                if authority_of(url) is None or not url.lower().startswith(("http://", "https://")):
                    return Capture(authority, at, status, kind=kind, note=f"redirects to {url[:200]}"), 0.0
            return Capture(authority, at, status, kind=kind, note=f"more than {REDIRECTS} redirects"), 0.0
        except TimeoutError:
            note = f"no whole answer in {self.config.timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: addresses that no library accepts
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return Capture(authority, at, 0, kind=kind, note=note), 0.0

    @contextlib.asynccontextmanager
    async def _turn(self, url: str) -> AsyncIterator[None]:
        """Wait until this host may be asked: nobody else is asking it, and the last request is `delay` ago."""
        host = host_of(authority_of(url) or url)
        lock = self._locks.get(host)
        if lock is None:
            lock = self._locks[host] = asyncio.Lock()
        async with lock:
            pause = self._turns.get(host, 0.0) - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            try:
                yield
            finally:
                if len(self._turns) > HOSTS:
                    now = time.monotonic()
                    self._turns = {name: turn for name, turn in self._turns.items() if turn > now}
                self._turns[host] = time.monotonic() + self.config.delay


def _spread(todo: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Requests of one host far apart from each other, so that the pauses between them cost nothing."""
    turns: dict[str, int] = {}
    keyed = []
    for place, (authority, kind) in enumerate(todo):
        host = host_of(authority)
        turns[host] = turn = turns.get(host, -1) + 1
        keyed.append((turn, place, (authority, kind)))
    return [item for _, _, item in sorted(keyed)]


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The start of a body, as much as is kept; the rest is not read."""
    held = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        held += chunk
        if len(held) >= BODY_LIMIT:
            response.close()
            break
    return bytes(held[:BODY_LIMIT])


def _headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: ", ".join(found)[:2000] for name in KEPT_HEADERS if (found := response.headers.getall(name, []))}


def _seconds(value: str) -> float:
    """A Retry-After in seconds; dates are not read."""
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0
