"""Terms of service: the taxonomy of Consent in Crisis (section 2.2), annotations per domain, and the mismatch table.

What terms say is read by people or by a judge of the user's choice (`terms_judge.py`), never guessed from keywords.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.errors import InputError

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "crawling_ai": (
        "no crawling and no AI",
        "no crawling, AI not mentioned",
        "no AI, crawling not mentioned",
        "conditional",
        "none",
    ),
    "license": ("personal, non-commercial or research use only", "conditional commercial use", "open"),
    "competing": ("no competing service", "no redistribution", "both", "none"),
}
"""Category to the meaning of its codes 1, 2, and so on."""

_STRICTEST: Mapping[str, tuple[int, ...]] = {
    "crawling_ai": (1, 2, 3, 4, 5),
    "license": (1, 2, 3),
    "competing": (3, 1, 2, 4),
}
"""Codes from strict to open; "both" forbids more than either of its halves."""

_FORBIDS = (1, 2, 3)
"""Codes of crawling_ai that forbid crawling or AI whatever the conditions."""

EXTENTS = ("no_robots", "none", "some", "full", "unknown")
"""Rows of the mismatch table: how far robots.txt restricts a domain (`domain.extent`), or that it has or gave none."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the terms of one domain say: category to code (from 1), and category to the passage that says it."""

    domain: str
    codes: Mapping[str, int]
    evidence: Mapping[str, str]

    def headline(self) -> str:
        """The one phrase the paper's figures show: AI terms that forbid, then non-commercial, then non-compete, then
        whatever the AI terms say."""
        ai, licence, competing = (self.codes.get(category, 0) for category in CATEGORIES)
        if ai not in _FORBIDS:
            if licence == 1:
                return CATEGORIES["license"][0]
            if 1 <= competing <= 3:
                return CATEGORIES["competing"][competing - 1]
        return CATEGORIES["crawling_ai"][ai - 1] if ai else "not annotated"


def check_codes(codes: Mapping[str, Any], where: str) -> dict[str, int]:
    """Codes as numbers, by category.

    Raises:
        InputError: an unknown category or code.
    """
    found = {}
    for category, code in codes.items():
        if category not in CATEGORIES:
            raise InputError(f"{where}: '{category}' is no category; known are {', '.join(CATEGORIES)}.")
        text = str(code).strip()
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= len(CATEGORIES[category]):
            raise InputError(f"{where}: {category} has the code '{text}'; give 1 to {len(CATEGORIES[category])}.")
        found[category] = int(text)
    return found


def read_annotations(path: Path) -> dict[str, Terms]:
    """Domain to terms, from CSV or JSONL with one code a row: `domain`, `category`, `code` and perhaps `evidence`.

    Rows of one domain, from several pages or annotators, are merged by the strictest code.

    Raises:
        InputError: naming the line that is wrong.
    """
    pages: dict[str, list[Terms]] = {}
    for where, row in _rows(path):
        missing = [key for key in ("domain", "category", "code") if row.get(key) in (None, "")]
        if missing:
            raise InputError(f"{where} has no '{missing[0]}'; every row needs domain, category and code.")
        domain = str(row["domain"]).strip().lower().rstrip(".")
        category = str(row["category"]).strip()
        codes = check_codes({category: row["code"]}, where)
        evidence = {category: str(row["evidence"])} if row.get("evidence") else {}
        pages.setdefault(domain, []).append(Terms(domain, codes, evidence))
    if not pages:
        raise InputError(f"{path} holds no annotations; write rows with domain, category, code and evidence.")
    return {domain: merge(found) for domain, found in pages.items()}


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, row) of a CSV or JSONL file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"{path}: line {reader.line_num}", row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}: line {number} is no JSON object; write one object per line.")
                    yield f"{path}: line {number}", row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a CSV or JSONL file.") from None
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} is neither CSV (by its name, .csv) nor JSONL in UTF-8 ({error}).") from None


def merge(pages: Iterable[Terms]) -> Terms:
    """Several pages of one domain as one: the strictest code of each category, with the evidence for it."""
    pages = list(pages)
    codes: dict[str, int] = {}
    evidence: dict[str, str] = {}
    for category, order in _STRICTEST.items():
        stated = [page for page in pages if category in page.codes]
        if stated:
            strictest = min(stated, key=lambda page: order.index(page.codes[category]))
            codes[category] = strictest.codes[category]
            if category in strictest.evidence:
                evidence[category] = strictest.evidence[category]
    return Terms(pages[0].domain, codes, evidence)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Tokens by what robots.txt says (`EXTENTS`) and what the terms say about crawling and AI.

    `cells[extent][code]`: tokens; code 0 where no annotation exists. Shares are of all tokens, 0 for an empty table.
    """

    cells: Mapping[str, Mapping[int, float]]

    @property
    def total(self) -> float:
        """All tokens."""
        return sum(sum(row.values()) for row in self.cells.values())

    def share(self, extents: Iterable[str], codes: Iterable[int]) -> float:
        """Share of the tokens in some rows and columns."""
        wanted = set(codes)
        tokens = sum(self.cells[extent][code] for extent in extents for code in self.cells[extent] if code in wanted)
        return tokens / self.total if self.total else 0.0

    def terms_stricter(self) -> float:
        """Share of tokens whose terms forbid crawling or AI while robots.txt restricts nothing (the paper's 35.1 %)."""
        return self.share(["no_robots", "none"], _FORBIDS)

    def robots_stricter(self) -> float:
        """Share of tokens that robots.txt restricts while the terms, where annotated, do not forbid (20.3 %)."""
        return self.share(["some", "full"], [4, 5])


def mismatch(tokens: Mapping[str, float], extents: Mapping[str, str], terms: Mapping[str, Terms]) -> Mismatch:
    """The table over domains weighted by tokens.

    A domain absent from `extents`, or with a value that is none of `EXTENTS`, counts as unknown.
    """
    codes = range(len(CATEGORIES["crawling_ai"]) + 1)
    cells = {extent: dict.fromkeys(codes, 0.0) for extent in EXTENTS}
    for domain, weight in tokens.items():
        known = terms.get(domain)
        code = known.codes.get("crawling_ai", 0) if known is not None else 0
        extent = extents.get(domain, "unknown")
        cells[extent if extent in cells else "unknown"][code] += weight
    return Mismatch(cells)
