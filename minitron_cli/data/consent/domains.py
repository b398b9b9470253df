"""Totals per domain over the whole corpus, and the domain view of Consent in Crisis made from them.

A domain is a host: http and https, and all ports, count together with the strictest of their policies. Totals pass
through sorted runs on disk and are merged as a stream, so memory does not grow with the number of domains.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from minitron_cli.data.consent.policy import EXTENTS

HEAD = 2000
"""Domains that the paper calls head: the largest by tokens."""

FAN_IN = 64
"""Runs merged at once."""

RUN_SCHEMA = pa.schema(
    [("host", pa.string()), ("extents", pa.string()), ("documents", pa.int64()), ("tokens", pa.int64())]
)
_BATCH = 1 << 14


class Domain(NamedTuple):
    """One host. `extents`: of the policy in force, then of each month: digits, one per viewed agent, into `EXTENTS`."""

    host: str
    extents: tuple[str, ...]
    documents: int
    tokens: int


@lru_cache(maxsize=1 << 16)
def strictest(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """Digit by digit the higher of two sites' extents."""
    return tuple("".join(map(max, a, b)) for a, b in zip(one, other, strict=True))


def folded(rows: Iterable[Domain]) -> Iterator[Domain]:
    """Rows in the order of their hosts, equal hosts made one."""
    held: Domain | None = None
    for row in rows:
        if held is None or held.host != row.host:
            if held is not None:
                yield held
            held = row
        else:
            extents = held.extents if held.extents == row.extents else strictest(held.extents, row.extents)
            held = Domain(row.host, extents, held.documents + row.documents, held.tokens + row.tokens)
    if held is not None:
        yield held


def write_run(path: Path, rows: Iterator[Domain]) -> None:
    """Write sorted rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, RUN_SCHEMA) as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            hosts, extents, documents, tokens = zip(*batch, strict=True)
            columns = [hosts, ["|".join(found) for found in extents], documents, tokens]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, RUN_SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=RUN_SCHEMA))


def read_run(path: Path) -> Iterator[Domain]:
    """The rows of a run, a batch in memory at a time."""
    known: dict[str, tuple[str, ...]] = {}
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            for host, extents, documents, tokens in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                found = known.get(extents)
                if found is None:
                    found = known[extents] = tuple(extents.split("|"))
                yield Domain(host, found, documents, tokens)


def merged(directory: Path, runs: Sequence[str]) -> Iterator[Domain]:
    """Every domain once, in the order of hosts; runs are removed once read."""
    names, made = list(runs), 0
    while len(names) > FAN_IN:
        some, names = names[:FAN_IN], names[FAN_IN:]
        name = f"state.sites-merged-{made:06d}.arrow"
        made += 1
        write_run(directory / name, _merge(directory, some))
        names.append(name)
    yield from _merge(directory, names)


def _merge(directory: Path, names: Sequence[str]) -> Iterator[Domain]:
    yield from folded(heapq.merge(*(read_run(directory / name) for name in names), key=lambda row: row.host))
    for name in names:
        (directory / name).unlink()


@dataclass(frozen=True)
class View:
    """What the domain view shows: rows (agent or organisation) as places in the digits, and the months of the timeline.

    `by_documents`: weigh domains by documents, where tokens are not known.
    """

    agents: Mapping[str, tuple[int, ...]]
    organisations: Mapping[str, tuple[int, ...]]
    months: tuple[str, ...]
    by_documents: bool


Sums = dict[str, list[int]]
"""Digits to [domains, documents, tokens]."""


def domain_view(domains: Iterable[Domain], view: View, see: Callable[[Domain], None]) -> dict[str, Any]:
    """The tables for all domains, head and tail, and the timeline; `see` is shown every domain."""
    everything: Sums = {}
    monthly: list[Sums] = [{} for _ in view.months]
    largest: list[tuple[int, str, Domain]] = []
    for domain in domains:
        see(domain)
        _add(everything, domain.extents[0], domain)
        for sums, digits in zip(monthly, domain.extents[1:], strict=True):
            _add(sums, digits, domain)
        entry = (domain.documents if view.by_documents else domain.tokens, domain.host, domain)
        if len(largest) < HEAD:
            heapq.heappush(largest, entry)
        elif entry > largest[0]:
            heapq.heapreplace(largest, entry)
    head: Sums = {}
    for _, _, domain in largest:
        _add(head, domain.extents[0], domain)
    tail = {digits: [a - b for a, b in zip(sums, head.get(digits, [0] * 3), strict=True)] for digits, sums in
            everything.items()}  # fmt: skip
    scopes = {"all": everything, "head": head, "tail": tail}
    return {
        "head_domains": HEAD,
        **{name: _tables(sums, view) for name, sums in scopes.items()},
        "timeline": [
            {"month": month, "agents": _rows(sums, view.agents), "organisations": _rows(sums, view.organisations)}
            for month, sums in zip(view.months, monthly, strict=True)
        ],
    }


def _add(sums: Sums, digits: str, domain: Domain) -> None:
    found = sums.setdefault(digits, [0, 0, 0])
    found[0] += 1
    found[1] += domain.documents
    found[2] += domain.tokens


def _tables(sums: Sums, view: View) -> dict[str, Any]:
    totals = [sum(values) for values in zip(*sums.values(), strict=True)] or [0, 0, 0]
    return {
        **dict(zip(("domains", "documents", "tokens"), totals, strict=True)),
        "agents": _rows(sums, view.agents),
        "organisations": _rows(sums, view.organisations),
    }


def _rows(sums: Sums, rows: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Per row and extent: domains, documents, tokens. A row of several agents has the strictest of their extents."""
    table = {}
    for name, places in rows.items():
        cells = {extent: [0, 0, 0] for extent in EXTENTS}
        for digits, values in sums.items():
            cell = cells[EXTENTS[int(max(digits[place] for place in places))]]
            for number, value in enumerate(values):
                cell[number] += value
        table[name] = {
            extent: dict(zip(("domains", "documents", "tokens"), cell, strict=True)) for extent, cell in cells.items()
        }
    return table
