"""What the store says about one URL: the four-valued verdict, cached per site and per distinct file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from minitron_cli.data.consent.agents import Agent
from minitron_cli.data.consent.domain import extent
from minitron_cli.data.consent.signals import SiteSignals, combine
from minitron_cli.data.consent.snapshot import Row, Snapshot, latest
from minitron_cli.data.consent.store import SIGNAL_HEADERS
from minitron_cli.data.consent.urls import other_scheme, split_url
from minitron_cli.data.robots import RobotsTxt
from minitron_cli.data.robots_pattern import path_octets

STATUSES = ("allowed", "disallowed", "no_robots", "unknown", "bad_url")
ALLOWED, DISALLOWED, NO_ROBOTS, UNKNOWN, BAD_URL = range(5)

EXTENTS = ("unknown", "no_robots", "none", "some", "full")
"""Domain view, from what says least to what forbids most; a place in it is a digit of `Policy.extents`."""

POLICY_BYTES, SITE_BYTES = 192 << 20, 64 << 20
"""What the two caches of a process hold at most, roughly."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class Outcome(NamedTuple):
    """The verdict on one URL.

    `base`: status by the site's robots.txt alone, never DISALLOWED. `blocked`: bit i is set when agent i may not have
    it. `refused_by`: every source that refuses, comma-separated (robots.txt, content-signal ...), also one that the
    question does not count. `rule`, `line`: what blocked the first blocked agent, or the rule that allowed the first.
    `conflict`: permission and refusal stand beside each other.
    """

    base: int
    blocked: int = 0
    refused_by: str = ""
    rule: str | None = None
    line: int | None = None
    conflict: bool = False

    @property
    def status(self) -> int:
        """Place in `STATUSES`: disallowed as soon as one agent is blocked."""
        return DISALLOWED if self.blocked else self.base


MALFORMED = Outcome(BAD_URL)


class LeastRecent(Generic[Key, Value]):
    """A cache that forgets what was not used for longest once its contents weigh more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.weight = limit, 0
        self._items: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, now the most recent, or None."""
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, weight: int) -> None:
        """Add a value that is not there yet."""
        self._items[key] = (value, weight)
        self.weight += weight
        while self.weight > self.limit and len(self._items) > 1:
            self.weight -= self._items.popitem(last=False)[1][1]


def base_status(status: int, robots: RobotsTxt | None) -> int:
    """Status of a site by the answer to its robots.txt request.

    2xx with a usable body: ALLOWED, the rules decide. 4xx: NO_ROBOTS. Everything else says nothing about the site's
    will: no answer, 5xx, 429 (too many requests), an endless redirect, and a body that is no robots.txt (an HTML page
    is mostly the site's error or log-in page served with status 200).
    """
    if 200 <= status < 300 and robots is not None and robots.rejected is None:
        return ALLOWED
    return NO_ROBOTS if 400 <= status < 500 and status != 429 else UNKNOWN


@dataclass(frozen=True)
class Question:
    """What is asked of every URL; small, so that it can be sent to processes.

    `agents`: judged for. `viewed`: names of the domain view. `at`: Unix time, None for the latest policy. `crawl`: as
    of each document's own date. `months`: ends (Unix time) of the months of the timeline.
    """

    agents: tuple[Agent, ...]
    viewed: tuple[str, ...]
    signals: str = "strictest"
    at: int | None = None
    crawl: bool = False
    either_scheme: bool = False
    months: tuple[int, ...] = ()


class Policy:
    """One distinct robots.txt with its signals, resolved for a fixed list of agents."""

    def __init__(
        self, base: int, robots: RobotsTxt, signals: SiteSignals, question: Question, named: bool = False
    ) -> None:
        """`named`: signals name agents, so that not all agents of one group and purpose are alike."""
        self.base, self.robots, self.rule = base, robots, question.signals
        self.signals = None if signals.empty else signals
        masks: dict[tuple[int, str, str], int] = {}
        for number, agent in enumerate(question.agents):
            group = robots.group_of(agent.name) if base == ALLOWED else -1
            key = (group, agent.purpose if self.signals else "", agent.name if named else "*")
            masks[key] = masks.get(key, 0) | 1 << number
        self.groups = [(*key, mask) for key, mask in masks.items()]
        self.extents = self._extents(question.viewed)
        bound = any(group[0] >= 0 for group in self.groups)
        self.constant = None if bound or self.signals else Outcome(base)
        """The one outcome of all URLs, where no group and no signal speaks."""

    def _extents(self, viewed: tuple[str, ...]) -> str:
        """One digit per viewed agent, a place in `EXTENTS`; agents of one group are looked at once."""
        if self.base != ALLOWED:
            return str(EXTENTS.index(STATUSES[self.base])) * len(viewed)
        groups = [self.robots.group_of(agent) for agent in viewed]
        found = dict(zip(groups, viewed, strict=True))
        digits = {group: str(EXTENTS.index(extent(self.robots, agent))) for group, agent in found.items()}
        return "".join(digits[group] for group in groups)

    def outcome(self, path: str) -> Outcome:
        """The verdict on a path with query, as it stands in a URL."""
        if self.constant is not None:
            return self.constant
        octets = path_octets(path)
        return self._by_rules(octets) if self.signals is None else self._by_signals(octets)

    def _by_rules(self, path: bytes) -> Outcome:
        first, blocked, blocker, decide = None, 0, None, self.robots.decide
        for group, _, _, mask in self.groups:
            verdict = decide(path, group)
            if not verdict.allowed:
                blocked |= mask
                blocker = blocker or verdict  # groups are in the order of their first agents
            first = first or verdict
        shown = blocker or first
        assert shown is not None
        return Outcome(self.base, blocked, "robots.txt" if blocked else "", shown.rule, shown.line)

    def _by_signals(self, path: bytes) -> Outcome:
        assert self.signals is not None
        blocked, conflict, sources = 0, False, dict[str, None]()
        shown: tuple[str | None, int | None] | None = None
        first: tuple[str | None, int | None] = (None, None)
        for group, purpose, name, mask in self.groups:
            verdict = self.robots.decide(path, group) if self.base == ALLOWED else None
            stated = self.signals.for_path(path, group, name)
            decision = combine(verdict, stated, "strictest", purpose)
            conflict = conflict or bool(decision.conflicts)
            by_rule = verdict is not None and not verdict.allowed
            sources.update({"robots.txt": None} if by_rule else {})
            sources.update({s.source: None for s in stated if s.allowed is False and s.where in decision.by})
            if by_rule or (self.rule == "strictest" and not decision.allowed):
                blocked |= mask
                here = (verdict.rule, verdict.line) if verdict is not None and by_rule else (decision.by[0], None)
                shown = shown or here
            if verdict is not None and first == (None, None):
                first = (verdict.rule, verdict.line)
        return Outcome(self.base, blocked, ", ".join(sources), *(shown or first), conflict)


@dataclass(slots=True)
class Site:
    """What is known of one authority. `extents`: of the policy in force, then of each month; None: resolved by date."""

    policy: Policy | None
    fetched_at: int | None
    extents: tuple[str, ...]
    rows: list[Row]
    markers: list[Row]


class Judge:
    """Answers for URLs out of a snapshot; one per process."""

    def __init__(self, snapshot: Snapshot, question: Question) -> None:
        self.snapshot, self.question = snapshot, question
        self._sites: LeastRecent[str, Site] = LeastRecent(SITE_BYTES)
        self._policies: LeastRecent[tuple[Any, ...], Policy] = LeastRecent(POLICY_BYTES)
        nothing = RobotsTxt.parse(b"")
        silent = SiteSignals(nothing, {}, None)
        self._unknown = Policy(UNKNOWN, nothing, silent, question)
        self._no_robots = Policy(NO_ROBOTS, nothing, silent, question)
        self._texts: dict[str, str] = {}

    def verdict(self, url: object, date: int | None = None) -> tuple[Outcome, str, Site | None, int | None]:
        """The outcome, the authority, what is known of it, and when the deciding capture was made.

        `date`: Unix time of the document's crawl, which counts only where the question asks for it; a document without
        one has no known policy then.
        """
        parts = split_url(url)
        if parts is None:
            return MALFORMED, "", None, None
        authority, path = parts
        site = self._sites.get(authority)
        if site is None:
            site = self._site(authority)
        policy, fetched_at = site.policy, site.fetched_at
        if policy is None:
            policy, fetched_at = self._in_force(site, date)
        return policy.constant or policy.outcome(path), authority, site, fetched_at

    def _site(self, authority: str) -> Site:
        known = authority
        rows = self.snapshot.rows(authority)
        other = other_scheme(authority)
        if not rows and self.question.either_scheme and other is not None:
            known, rows = other, self.snapshot.rows(other)
        markers = self.snapshot.rows(known, kind=1)
        site = Site(None, None, (), rows, markers)
        now, fetched_at = self._as_of(site, self.question.at)
        extents = [now.extents, *(self._as_of(site, month)[0].extents for month in self.question.months)]
        site.extents = tuple(self._texts.setdefault(text, text) for text in extents)
        if not self.question.crawl:
            site.policy, site.fetched_at = now, fetched_at
        self._sites.put(authority, site, 600 + 100 * (len(rows) + len(markers)))
        return site

    def _in_force(self, site: Site, date: int | None) -> tuple[Policy, int | None]:
        """As of a document's date; without one nothing is known."""
        return (self._unknown, None) if date is None else self._as_of(site, date)

    def _as_of(self, site: Site, at: int | None) -> tuple[Policy, int | None]:
        row, marker = latest(site.rows, at), latest(site.markers, at)
        if row is None and marker is None:
            return self._unknown, None
        policy = self._policy(row, marker if marker is not None and marker.status == 200 else None)
        return policy, row.fetched_at if row is not None else None

    def _policy(self, row: Row | None, marker: Row | None) -> Policy:
        """The policy of a robots.txt capture and a tdmrep.json capture; shared by all sites with the same bytes."""
        readable = row is not None and 200 <= row.status < 300
        plain = NO_ROBOTS if row is not None and base_status(row.status, None) == NO_ROBOTS else UNKNOWN
        headers = self._signal_headers(row) if row is not None else {}
        if not readable and marker is None and not headers:
            return self._no_robots if plain == NO_ROBOTS else self._unknown
        body = self.snapshot.body_key(row.number) if readable and row is not None else plain
        tdmrep = self.snapshot.body_key(marker.number) if marker is not None else None
        key = (body, tdmrep, tuple(headers.items()))
        found = self._policies.get(key)
        if found is None:
            found = self._read(row if readable else None, marker, plain, headers)
            octets = (body[1] if isinstance(body, tuple) else 0) + (tdmrep[1] if tdmrep is not None else 0)
            self._policies.put(key, found, 4000 + 12 * octets)
        return found

    def _read(self, row: Row | None, marker: Row | None, plain: int, headers: Mapping[str, str]) -> Policy:
        robots = RobotsTxt.parse(self.snapshot.body(row.number) if row is not None else b"")
        base = base_status(row.status, robots) if row is not None else plain
        tdmrep = self.snapshot.body(marker.number) if marker is not None else None
        signals = SiteSignals(robots, headers, tdmrep)
        return Policy(base, robots, signals, self.question, named="x-robots-tag" in headers)

    def _signal_headers(self, row: Row) -> dict[str, str]:
        """The headers that may hold a signal; most sites have none, and those share policies by their body."""
        if self.snapshot.header_key(row.number) == "{}":
            return {}
        found = self.snapshot.headers(row.number)
        return {name: found[name] for name in SIGNAL_HEADERS if name in found}
