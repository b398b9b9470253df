"""`minitron data robots fetch`: ask every site of a corpus for its robots.txt, politely, into the store.

By RFC 9309: redirects are followed, also to other hosts, and what they lead to counts for the site asked first; 4xx,
5xx and no answer are recorded as such. One request per host at a time, with a pause between two.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron_cli.config.audit import RobotsFetchConfig
from minitron_cli.data.consent.client import HOSTS, Fetcher, is_failure, run_until_signal
from minitron_cli.data.consent.corpus import open_corpus
from minitron_cli.data.consent.rows import read_part
from minitron_cli.data.consent.store import ROBOTS, TDMREP, StoreWriter, read_index
from minitron_cli.data.consent.urls import authority_of
from minitron_cli.data.readers import text_lines
from minitron_cli.errors import InputError
from minitron_cli.runtime.progress import say


@dataclass(frozen=True)
class FetchResult:
    """`sites` of the corpus; `fresh` ones were in the store; `fetched` now, by class of status ("none": no answer)."""

    out: str
    sites: int
    fresh: int
    fetched: int
    malformed: int
    status: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def run_fetch(config: RobotsFetchConfig) -> FetchResult:
    """Fetch what the store does not hold or holds too old; Ctrl-C and a kill leave a valid store.

    Raises:
        UserError: the corpus cannot be read, or the store cannot be written.
    """
    sites, malformed = corpus_sites(config)
    kinds = (ROBOTS, TDMREP) if config.tdmrep else (ROBOTS,)
    wanted = {(site, kind) for site in sites for kind in kinds}
    todo = sorted(wanted - _fresh(config))
    fetcher = Fetcher(config)
    with StoreWriter(config.out) as writer:
        if todo:
            say(f"{len(sites)} sites; {len(todo)} requests, as {fetcher.user_agent}")
            run_until_signal(fetcher.run(todo, writer))
    return FetchResult(
        str(config.out), len(sites), len(sites) - len({site for site, _ in todo}), fetcher.done, malformed,
        dict(sorted(fetcher.status.items())),
    )  # fmt: skip


def corpus_sites(config: RobotsFetchConfig) -> tuple[set[str], int]:
    """The authorities of a corpus, or of a text file with one per line; and how many URLs name none.

    Raises:
        InputError: the corpus cannot be read, or names no site at all.
    """
    sites: set[str] = set()
    seen: set[Any] = set()
    malformed = 0
    for url in _urls(config):
        if isinstance(url, str) and url in seen:
            continue
        authority = authority_of(url)
        if authority is None:
            malformed += 1
        else:
            sites.add(authority)
            if isinstance(url, str) and len(seen) < HOSTS:
                seen.add(url)
    if not sites:
        raise InputError(f"{config.corpus} names no web site ({malformed} malformed URLs).")
    return sites, malformed


def _urls(config: RobotsFetchConfig) -> Iterator[Any]:
    path = Path(config.corpus).expanduser()
    if path.is_file() and path.suffix in (".txt", ""):
        yield from (line.strip() for line in text_lines(path) if line.strip() and not line.startswith("#"))
        return
    corpus = open_corpus(config.corpus, url=config.url_column, subset=config.subset, split=config.hub_split)
    for part in corpus.parts:
        for batch in read_part(part, corpus.columns, None, whole=False):
            yield from batch.urls


def _fresh(config: RobotsFetchConfig) -> set[tuple[str, str]]:
    """What needs no request: captured within `max_age`, and not failed where failures are to be repeated."""
    try:
        table = read_index(config.out)
    except InputError:
        if config.out.exists() and any(config.out.glob("*.parquet")):
            raise  # a damaged store, not an empty one
        return set()
    oldest = time.time() - 86400 * config.max_age
    fresh = set()
    for authority, kind, at, status in zip(*(column.to_pylist() for column in table.columns), strict=True):
        if at.timestamp() >= oldest and not (config.retry_failed and is_failure(status)):
            fresh.add((authority, kind))
    return fresh
