"""robots.txt captures in WARC files, as Common Crawl publishes them (`crawl-data/CC-MAIN-*/robotstxt.paths.gz`).

A crawler records every hop of a redirect as a response of its own. RFC 9309 has the rules at the end of the redirects
count for the site asked first, so the hops are joined: one pass finds the redirects, the second reads the bodies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from minitron_cli.data.consent.rows import moment
from minitron_cli.data.consent.store import BODY_LIMIT, KEPT_HEADERS, Capture
from minitron_cli.data.consent.urls import split_url
from minitron_cli.errors import InputError

WARC_SUFFIXES = (".warc", ".warc.gz")
REDIRECTS = 10
ROBOTS_PATH = "/robots.txt"


@dataclass(frozen=True)
class Response:
    """One recorded answer. `cut`: the connection broke before the whole body was there."""

    url: str
    status: int
    fetched_at: int
    location: str
    headers: dict[str, str]
    body: bytes
    cut: bool


def warc_captures(files: Sequence[Path]) -> Iterator[Capture | None]:
    """Captures of all files; None for a response whose URL names no web host. Memory: the redirects.

    Raises:
        InputError: `warcio` is not installed, or a file is damaged.
    """
    if not files:
        return
    redirects: dict[str, tuple[str, int, int]] = {}
    for file in files:
        for found in read_responses(file, bodies=False):
            if found.location:
                redirects[found.url] = (urljoin(found.url, found.location), found.status, found.fetched_at)
    wanted: dict[str, list[str]] = {}
    for url in redirects:
        if _asked(url) is not None:
            wanted.setdefault(_end(url, redirects), []).append(url)
    ended: set[str] = set()
    for file in files:
        for found in read_responses(file, bodies=True):
            if found.location:
                continue
            if split_url(found.url) is None:
                yield None
                continue
            for url in dict.fromkeys([found.url, *wanted.get(found.url, [])]):
                authority = _asked(url)
                if authority is not None:
                    ended.add(url)
                    note = "" if url == found.url else f"redirected to {found.url}"
                    status = 0 if found.cut else found.status
                    note = "the connection broke" if found.cut else note
                    body = b"" if found.cut or not 200 <= status < 300 else found.body
                    yield Capture(authority, found.fetched_at, status, body, found.headers, note=note)
    for end, urls in wanted.items():
        for url in urls:
            authority = _asked(url)
            if url not in ended and authority is not None:
                yield Capture(authority, redirects[url][2], redirects[url][1], note=f"redirect to {end}, not captured")


def _asked(url: str) -> str | None:
    """The authority whose robots.txt this URL is, or None."""
    parts = split_url(url)
    return parts[0] if parts is not None and parts[1] == ROBOTS_PATH else None


def _end(url: str, redirects: dict[str, tuple[str, int, int]]) -> str:
    """Where a chain of redirects ends; where it goes in circles, somewhere in the circle."""
    for _ in range(REDIRECTS):
        if url not in redirects:
            return url
        url = redirects[url][0]
    return url


def read_responses(file: Path, *, bodies: bool) -> Iterator[Response]:
    """The HTTP responses of a WARC file, bodies without transfer and content coding.

    Raises:
        InputError: `warcio` is not installed, or the file is damaged.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError:
        raise InputError("Reading WARC needs the package warcio; install it with `pip install warcio`.") from None
    count = 0
    try:
        with file.open("rb") as stream:
            for record in ArchiveIterator(stream):
                if record.rec_type == "response" and record.http_headers is not None:
                    found = _response(record, bodies)
                    count += 1
                    if found is not None:
                        yield found
    except InputError:
        raise
    except Exception as error:  # damaged compression, broken headers: the library raises many kinds
        raise InputError(f"{file} is damaged after {count} responses: {error}") from None
    if not count:
        raise InputError(f"{file} holds no HTTP responses; is it a WARC file?")


def _response(record: Any, bodies: bool) -> Response | None:
    url = (record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
    at = moment(record.rec_headers.get_header("WARC-Date") or "")
    code = record.http_headers.get_statuscode() or ""
    if not code.isdigit() or at is None:
        return None
    status = int(code)
    location = record.http_headers.get_header("Location") or "" if status in (301, 302, 303, 307, 308) else ""
    headers = {name: value for name in KEPT_HEADERS if (value := record.http_headers.get_header(name))}
    cut = record.rec_headers.get_header("WARC-Truncated") in ("disconnect", "time")
    body = record.content_stream().read(BODY_LIMIT) if bodies and not location else b""
    return Response(url, status, at, location, headers, body, cut)
