"""Consent signals beside Allow and Disallow, and one answer out of all of them.

Read: Content-Usage (IETF AIPREF drafts of 2026, rule and HTTP field), Content-Signal (Cloudflare, 2025), License (RSL
1.0), tdmrep.json and its header (W3C TDM Reservation Protocol), X-Robots-Tag with noai and its kin. All of them state
wishes about use; only robots.txt speaks about access.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_cli.data.robots import Record, RobotsTxt, Rule, Verdict, target
from minitron_cli.data.robots_pattern import RuleSet

RULES = ("strictest", "robots")
"""How `combine` decides: any refusal counts, or robots.txt alone (the signals are then only reported)."""

_PURPOSE = {
    **dict.fromkeys(("train-ai", "train-genai", "ai-train", "genai", "ai"), "training"),
    "search": "search",
    **dict.fromkeys(("ai-input", "ai-use", "ai-output"), "input"),
}
"""Names of uses in Content-Usage (its vocabulary changed between drafts) and Content-Signal; others mean nothing."""

_VALUE = {"y": True, "yes": True, "n": False, "no": False}

_TAGS = {"noai": "training", "noimageai": "image", "noindex": "search", "none": "search"}
"""What an X-Robots-Tag directive refuses."""

_TAGS_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}

_COVERS = {"training": {"training", "tdm"}, "search": {"search"}, "user_fetch": {"input"}}
"""Purpose of an agent to the signals that bear on it. Text and data mining covers training (EU 2019/790, Article 4)."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One statement about one use.

    `source`: content-usage, content-signal, rsl, tdmrep, tdm-header or x-robots-tag. `purpose`: training, search, input
    (live input of an answering model), tdm or image. `allowed`: None when it points to terms that must be read
    elsewhere. `where`: the line or header as written, for the report.
    """

    source: str
    purpose: str
    allowed: bool | None
    where: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The combined answer. `by`: what refused. `conflicts`: one sentence per contradiction. `unread`: terms to read."""

    allowed: bool
    by: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Scoped:
    """Statements of one line for the paths of one pattern; an empty pattern is every path."""

    source: str
    pattern: str
    uses: Mapping[str, bool]
    where: str


class SiteSignals:
    """All signals of one site, read once; `for_path` is the fast path. `empty`: the site makes no statement at all.

    `headers`: HTTP fields of the document's own response, or, lacking that, of the site's. `tdmrep`: the body of
    /.well-known/tdmrep.json.
    """

    def __init__(self, robots: RobotsTxt, headers: Mapping[str, str], tdmrep: bytes | None) -> None:
        self._robots = robots
        self._scoped = {id(record): scoped for record in robots.records if (scoped := _scoped(record))}
        self._fixed = [Signal("rsl", "training", None, f"License: {value}") for _, value in robots.lines("license")]
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._tags = self._headers.get("x-robots-tag", "")
        self._fixed += _header_signals(self._headers)
        header = self._headers.get("tdm-reservation", "").strip()
        self._mining: list[tuple[RuleSet, Signal]] = []
        if header in ("0", "1"):  # the header overrides the file
            self._fixed.append(Signal("tdm-header", "tdm", header == "0", f"tdm-reservation: {header}"))
        elif tdmrep:
            self._mining = list(_tdmrep(tdmrep))
        self._by_group: dict[int, tuple[tuple[RuleSet, list[_Scoped]], ...]] = {}
        self.empty = not (self._scoped or self._fixed or self._mining or self._tags)

    def for_path(self, path: bytes, group: int, agent: str = "*") -> list[Signal]:
        """Signals for a path from `robots.target` and a number from `RobotsTxt.group_of(agent)`."""
        if self.empty:
            return []
        found = list(self._fixed)
        for rules, statements in self._statements(group):
            found += self._longest(rules, statements, path, group)
        found += _tags(self._tags, agent)
        first = next((signal for rules, signal in self._mining if rules.winner(path) >= 0), None)
        if first is not None and first.allowed is not None:
            found.append(first)
        return found

    def _statements(self, group: int) -> tuple[tuple[RuleSet, list[_Scoped]], ...]:
        """Per source: the patterns of a group's lines, and the lines. Worked out once per group."""
        known = self._by_group.get(group)
        if known is None:
            lines = [
                self._scoped[id(record)] for record in self._robots.records_of(group) if id(record) in self._scoped
            ]
            known = self._by_group[group] = tuple(
                (RuleSet([Rule(False, line.pattern or "/", 0) for line in chosen]), chosen)
                for source in ("content-usage", "content-signal")
                if (chosen := [line for line in lines if line.source == source])
            )
        return known

    def _longest(self, rules: RuleSet, statements: list[_Scoped], path: bytes, group: int) -> Iterator[Signal]:
        """The statements with the longest matching pattern; of equal patterns all speak, and refusals win per use."""
        winner = rules.winner(path)
        if winner < 0:
            return
        best = statements[winner]
        if best.source == "content-usage" and not self._robots.decide(path, group).allowed:
            return  # where crawling is disallowed, Content-Usage expresses nothing
        uses: dict[str, tuple[bool, str]] = {}
        for statement in statements:
            if (statement.pattern or "/") == (best.pattern or "/"):
                for purpose, allowed in statement.uses.items():
                    if purpose not in uses or not allowed:
                        uses[purpose] = allowed, statement.where
        yield from (Signal(best.source, purpose, allowed, where) for purpose, (allowed, where) in uses.items())


def signals_of(
    robots: RobotsTxt, url: str, headers: Mapping[str, str], tdmrep: bytes | None, agent: str = "*"
) -> list[Signal]:
    """Every signal that applies to a URL for an agent; never raises on content. Arguments as of `SiteSignals`."""
    return SiteSignals(robots, headers, tdmrep).for_path(target(url), robots.group_of(agent), agent)


def combine(
    robots_verdict: Verdict | None, signals: Sequence[Signal], rule: str = "strictest", purpose: str = "training"
) -> Decision:
    """One answer for an agent's purpose out of robots.txt (None: there is none) and the other signals.

    A conflict is an explicit permission beside a refusal; silence of robots.txt is no permission.
    """
    concerned = [signal for signal in signals if signal.purpose in _COVERS.get(purpose, set())]
    refused = [signal.where for signal in concerned if signal.allowed is False]
    granted = [signal.where for signal in concerned if signal.allowed is True]
    unread = tuple(signal.where for signal in concerned if signal.allowed is None)
    by = list(refused) if rule == "strictest" else []
    if robots_verdict is not None and robots_verdict.rule is not None:
        line = f"{'Allow' if robots_verdict.allowed else 'Disallow'}: {robots_verdict.rule}"
        (granted if robots_verdict.allowed else refused).insert(0, line)
        if not robots_verdict.allowed:
            by.insert(0, line)
    conflicts = tuple(f"'{yes}' permits {purpose}, '{no}' refuses it." for yes in granted for no in refused)
    return Decision(not by, tuple(by), conflicts, unread)


def _scoped(record: Record) -> _Scoped | None:
    """A Content-Usage or Content-Signal line: an optional path, then `use=value` pairs."""
    if record.name not in ("content-usage", "content-signal"):
        return None
    pattern, rest = "", record.value
    if rest[:1] in ("/", "*"):
        pattern, _, rest = re.sub(r"\s+", " ", rest).partition(" ")
    uses = _uses(rest)
    where = f"{record.name.title()}: {record.value}"
    return _Scoped(record.name, pattern, uses, where) if uses else None


def _uses(text: str) -> dict[str, bool]:
    """Purpose to permission from a dictionary such as `train-ai=n, search=y`; what is unknown states nothing."""
    found: dict[str, bool] = {}
    for item in text.split(","):
        name, _, value = item.partition(";")[0].partition("=")
        purpose, allowed = _PURPOSE.get(name.strip().lower()), _VALUE.get(value.strip().lower())
        if purpose is not None and allowed is not None:
            found[purpose] = allowed and found.get(purpose, True)
    return found


def _header_signals(headers: Mapping[str, str]) -> Iterator[Signal]:
    usage = headers.get("content-usage", "")
    for purpose, allowed in _uses(usage).items():
        yield Signal("content-usage", purpose, allowed, f"Content-Usage header: {usage}")
    if "application/rsl+xml" in headers.get("link", "").lower():
        yield Signal("rsl", "training", None, f"Link header: {headers['link']}")


def _tags(value: str, agent: str) -> Iterator[Signal]:
    """Refusals of an X-Robots-Tag field; `name: directives` binds that agent only, up to the next name."""
    applies = True
    for item in value.split(","):
        name, colon, rest = item.strip().partition(":")
        directive = name.strip().lower()
        if colon and directive not in _TAGS_WITH_VALUE:
            applies, directive = directive == agent.lower(), rest.strip().lower()
        if applies and directive in _TAGS:
            yield Signal("x-robots-tag", _TAGS[directive], False, f"X-Robots-Tag: {item.strip()}")


def _tdmrep(body: bytes) -> Iterator[tuple[RuleSet, Signal]]:
    """The rules of a tdmrep.json in order: the first that matches a path is the one that counts.

    A rule with any other value than 0 or 1 is as good as absent, but still hides those after it.
    """
    try:
        rules: Any = json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return
    for rule in rules if isinstance(rules, list) else [rules]:
        location = rule.get("location") if isinstance(rule, dict) else None
        if not isinstance(location, str) or not location.startswith(("/", "*")):
            continue
        value = rule.get("tdm-reservation")
        stated = str(value) if value in (0, 1, "0", "1") and not isinstance(value, bool) else None
        policy = f", policy {rule['tdm-policy']}" if isinstance(rule.get("tdm-policy"), str) else ""
        where = f"tdmrep.json: {location} {value}{policy}"
        yield (
            RuleSet([Rule(False, location, 0)]),
            Signal("tdmrep", "tdm", {"0": True, "1": False}.get(stated or ""), where),
        )
