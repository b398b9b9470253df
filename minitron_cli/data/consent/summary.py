"""The numbers of an audit: documents and tokens per status, agent, purpose and source of refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from minitron_cli.data.consent.agents import Agent
from minitron_cli.data.consent.audit import Kind, PartCounts
from minitron_cli.data.consent.domains import Domain
from minitron_cli.data.consent.policy import DISALLOWED, EXTENTS, STATUSES
from minitron_cli.data.consent.terms import CATEGORIES, Terms, mismatch

Cell = dict[str, int]
"""`documents` and `tokens`."""


def cell(documents: int = 0, tokens: int = 0) -> Cell:
    """One entry of a table."""
    return {"documents": documents, "tokens": tokens}


def _row() -> dict[str, Cell]:
    return {status: cell() for status in STATUSES}


def _add(target: Cell, other: Mapping[str, int]) -> None:
    for key, value in other.items():
        target[key] += value


def merged_counts(parts: Iterable[PartCounts]) -> dict[Kind, Cell]:
    """The counts of all parts."""
    total: dict[Kind, Cell] = {}
    for part in parts:
        for kind, found in part.kinds.items():
            _add(total.setdefault(kind, cell()), cell(*found))
    return total


def count_tables(counts: Mapping[Kind, Cell], agents: tuple[Agent, ...]) -> dict[str, Any]:
    """The tables that follow from the counts: all documents, by status, agent, purpose, source of refusal."""
    purposes = dict.fromkeys(dict.fromkeys(agent.purpose for agent in agents), 0)
    for number, agent in enumerate(agents):
        purposes[agent.purpose] |= 1 << number
    total, conflicts = cell(), cell()
    status = _row()
    by_agent = [_row() for _ in agents]
    by_purpose = {purpose: _row() for purpose in purposes}
    sources: dict[str, Cell] = {}
    for (base, blocked, refused_by, conflict), found in counts.items():
        _add(total, found)
        _add(status[STATUSES[DISALLOWED if blocked else base]], found)
        for number, row in enumerate(by_agent):
            _add(row[STATUSES[DISALLOWED if blocked >> number & 1 else base]], found)
        for purpose, mask in purposes.items():
            _add(by_purpose[purpose][STATUSES[DISALLOWED if blocked & mask else base]], found)
        for source in refused_by.split(", ") if refused_by else ():
            _add(sources.setdefault(source, cell()), found)
        if conflict:
            _add(conflicts, found)
    return {
        **total,
        "status": status,
        "agents": {
            agent.name: {"operator": agent.operator, "purpose": agent.purpose, **row}
            for agent, row in zip(agents, by_agent, strict=True)
        },
        "purposes": by_purpose,
        "refused_by": dict(sorted(sources.items())),
        "conflicts": conflicts,
    }


def without_tokens(value: Any) -> Any:
    """The same tables with null for every number of tokens: nothing told them."""
    if not isinstance(value, Mapping):
        return [without_tokens(item) for item in value] if isinstance(value, list) else value
    return {
        key: None if key == "tokens" and not isinstance(item, Mapping) else without_tokens(item)
        for key, item in value.items()
    }


class TermsTable:
    """Robots.txt against terms of service, gathered domain by domain; domains without annotation count together."""

    def __init__(self, terms: Mapping[str, Terms], places: tuple[int, ...], by_documents: bool) -> None:
        """`places`: the audited agents in a domain's digits; the strictest of them counts."""
        self._terms, self._places, self._by_documents = terms, places, by_documents
        self._weights: dict[str, float] = {}
        self._extents: dict[str, str] = {}
        self._found: dict[str, Terms] = {}

    def see(self, domain: Domain) -> None:
        """Add one domain."""
        extent = EXTENTS[int(max(domain.extents[0][place] for place in self._places))]
        found = self._terms.get(domain.host) or self._terms.get(domain.host.removeprefix("www."))
        name = domain.host
        if found is None:
            name = f"({extent})"  # no host has brackets, so the sum of those without annotation has its own name
        else:
            self._found[name] = found
        self._weights[name] = self._weights.get(name, 0) + (domain.documents if self._by_documents else domain.tokens)
        self._extents[name] = extent

    def to_json(self) -> dict[str, Any]:
        """Cells by extent and code (0: not annotated), the meaning of the codes, and the two mismatches as shares."""
        table = mismatch(self._weights, self._extents, self._found)
        some = bool(table.total)
        return {
            "annotated_domains": len(self._found),
            "weight": "documents" if self._by_documents else "tokens",
            "codes": {"0": "not annotated", **{str(n): text for n, text in enumerate(CATEGORIES["crawling_ai"], 1)}},
            "cells": {row: {str(code): value for code, value in cells.items()} for row, cells in table.cells.items()},
            "terms_stricter": table.terms_stricter() if some else 0.0,
            "robots_stricter": table.robots_stricter() if some else 0.0,
        }
