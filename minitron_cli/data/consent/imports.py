"""`minitron data robots import`: robots.txt files that are on disk into the store."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import RobotsImportConfig
from minitron_cli.data.consent.rows import moment
from minitron_cli.data.consent.store import BODY_LIMIT, KINDS, ROBOTS, TDMREP, Capture, StoreWriter
from minitron_cli.data.consent.urls import authority_of, other_scheme, split_url
from minitron_cli.data.consent.warc import WARC_SUFFIXES, warc_captures
from minitron_cli.data.readers import JSON_SUFFIXES, json_rows
from minitron_cli.errors import InputError
from minitron_cli.runtime.progress import Progress, say

SUFFIX, NAME = ".robots.txt", "robots.txt"
TDMREP_PATH = "/.well-known/tdmrep.json"
SITE_KEYS = ("authority", "url", "domain", "host")
BODY_KEYS = ("body", "content", "robots_txt", "text")
DATE_KEYS = ("fetched_at", "date", "timestamp")


@dataclass(frozen=True)
class ImportResult:
    """What was added: `captures` in all, by `status` class; `skipped`: entries whose site is no web host."""

    out: str
    captures: int
    files: int
    skipped: int
    status: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def run_import(config: RobotsImportConfig) -> ImportResult:
    """Add every robots.txt below `config.path` to the store `config.out`. Captures are added as they are read, so a
    run that ends early leaves a valid store; importing the same twice stores it twice, which changes no verdict.

    A site named without a scheme (a bare domain) is stored for http and for https.

    Raises:
        UserError: the path holds nothing that can be imported, or a file of it is damaged.
    """
    date = None if config.date is None else moment(datetime.fromisoformat(config.date))
    files = _files(config.path)
    status: Counter[str] = Counter()
    skipped = 0
    with StoreWriter(config.out) as writer, Progress("import", len(files), "files") as progress:
        warcs = [file for file in files if file.name.endswith(WARC_SUFFIXES)]
        others = [file for file in files if not file.name.endswith(WARC_SUFFIXES)]
        sources = [(1, _captures(file, date)) for file in others]
        for count, captures in [*sources, (len(warcs), warc_captures(warcs))]:
            for capture in captures:
                if capture is None:
                    skipped += 1
                    continue
                writer.add(capture)
                status[f"{capture.status // 100}xx" if capture.status else "none"] += 1
            progress.advance(count)
    if skipped:
        say(f"{skipped} entries name no web host and were left out.")
    if not writer.added:
        raise InputError(f"{config.path} holds no robots.txt of a web host.")
    return ImportResult(str(config.out), writer.added, len(files), skipped, dict(sorted(status.items())))


def _files(path: Path) -> list[Path]:
    """The files to import, in the order of their names.

    Raises:
        InputError: there are none.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if path.is_file():
        if not _importable(path):
            raise InputError(f"{path} is neither DOMAIN.robots.txt, JSONL (also .gz, .zst) nor WARC (also .gz).")
        return [path]
    found = sorted(item for item in path.rglob("*") if item.is_file() and _importable(item))
    if not found:
        raise InputError(f"{path} holds no DOMAIN.robots.txt, DOMAIN/robots.txt, JSONL or WARC file.")
    return found


def _importable(path: Path) -> bool:
    return path.name.endswith((SUFFIX, *JSON_SUFFIXES, *WARC_SUFFIXES)) or path.name == NAME


def _captures(file: Path, date: int | None) -> Iterator[Capture | None]:
    """The captures of one file; None for what names no host."""
    if file.name.endswith(JSON_SUFFIXES):
        yield from _json_captures(file, date)
        return
    domain = file.parent.name if file.name == NAME else file.name.removesuffix(SUFFIX)
    with file.open("rb") as stream:
        body = stream.read(BODY_LIMIT)
    at = int(file.stat().st_mtime) if date is None else date
    authorities = _authorities(domain)
    yield from (Capture(authority, at, 200, body) for authority in authorities)
    if not authorities:
        yield None


def _authorities(site: object) -> list[str]:
    """A URL's authority; both schemes for a bare domain; nothing for what is neither."""
    authority = authority_of(site)
    if authority is None:
        return []
    bare = isinstance(site, str) and "://" not in site
    other = other_scheme(authority) if bare else None
    return [authority] if other is None else sorted((authority, other))


def _json_captures(file: Path, date: int | None) -> Iterator[Capture | None]:
    for where, row, _ in json_rows(file):
        site = _first(row, SITE_KEYS)
        if site is None:
            raise InputError(f"{where} names no site; give one of {', '.join(SITE_KEYS)}.")
        body = _body(row, where)
        at = next((moment(row[key]) for key in DATE_KEYS if row.get(key) is not None), date)
        if at is None:
            raise InputError(f"{where} has no date that can be read ({', '.join(DATE_KEYS)}); give it with --date.")
        status = row.get("status", 200)
        if not isinstance(status, int) or not 0 <= status < 1000:
            raise InputError(f"{where}: status {status!r} is no HTTP status; use 0 where no answer came.")
        parts = split_url(site)
        kind = row.get("kind", TDMREP if parts is not None and parts[1] == TDMREP_PATH else ROBOTS)
        if kind not in KINDS:
            raise InputError(f"{where}: kind {kind!r} is none of {', '.join(KINDS)}.")
        headers = row.get("headers") or {}
        if not isinstance(headers, dict):
            raise InputError(f"{where}: headers are no JSON object.")
        kept = {str(name).lower(): str(value) for name, value in headers.items()}
        authorities = _authorities(site)
        yield from (Capture(authority, at, status, body, kept, kind) for authority in authorities)
        if not authorities:
            yield None


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _body(row: dict[str, Any], where: str) -> bytes:
    if isinstance(row.get("body_base64"), str):
        try:
            return base64.b64decode(row["body_base64"], validate=True)[:BODY_LIMIT]
        except binascii.Error:
            raise InputError(f"{where}: body_base64 is not Base64.") from None
    body = _first(row, BODY_KEYS)
    if body is not None and not isinstance(body, str):
        raise InputError(f"{where}: the body is {type(body).__name__}, not text (binary: body_base64).")
    return (body or "").encode("utf-8", "surrogatepass")[:BODY_LIMIT]
