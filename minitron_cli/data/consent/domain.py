"""The domain view of Consent in Crisis (section 2 and its taxonomy of robots.txt): how far a site restricts an agent.

The classes are the paper's; how they are decided is not. The paper's code read the rules' text; here the matcher is
asked, so groups, wildcards, ties and exceptions count as they do for a URL. The questions are probes: the root, a path
that no rule names, and for every rule the paths it was written for, with and without something in place of each `*` and
at the end.

- full: no probe may be fetched. `/robots.txt`, which always may, and Allow rules for it alone are left out.
- some: some probe may not be fetched.
- none: every probe may be fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minitron_cli.data.robots import RobotsTxt, Rule
from minitron_cli.data.robots_pattern import ROBOTS_PATH, normalise

EXTENTS = ("none", "some", "full")
"""From open to closed."""

LEVELS = (
    "no robots.txt",
    "no restriction",
    "sitemap only",
    "sitemap and crawl-delay",
    "search or query patterns",
    "specific directories",
    "fully disallowed",
)
"""Consent in Crisis, taxonomy of robots.txt, ascending; a level is the place here, counted from 1."""

_UNNAMED = b"zq0-xv9"
"""Stands for anything in a path: no rule is expected to name it."""


def extent(robots: RobotsTxt, agent: str) -> str:
    """none, some or full: how much of a site an agent may not fetch."""
    group = robots.group_of(agent)
    allowed = {robots.decide(probe, group).allowed for probe in _probes(robots.rules(group))}
    return "none" if allowed == {True} else "full" if allowed == {False} else "some"


def organisation_extent(robots: RobotsTxt, agents: Iterable[str]) -> str:
    """The strictest extent of an organisation's agents; "none" for no agents."""
    return max((extent(robots, agent) for agent in agents), key=EXTENTS.index, default=EXTENTS[0])


def level(robots: RobotsTxt | None, agent: str) -> int:
    """1 to 7: place in `LEVELS`; None, and a body that is no robots.txt, count as having none.

    Levels 5 and 6 look at the Disallow rules that win somewhere: 5 when each is about a query or a search page. Levels
    3 and 4 look at the Sitemap lines of the file and the Crawl-delay of the agent's group; a delay alone is level 4.
    """
    if robots is None or robots.rejected is not None:
        return 1
    reach, group = extent(robots, agent), robots.group_of(agent)
    if reach == "full":
        return 7
    if reach == "some":
        verdicts = [robots.decide(probe, group) for probe in _probes(robots.rules(group))]
        return 5 if all(verdict.allowed or _is_search(verdict.rule or "") for verdict in verdicts) else 6
    if group >= 0 and any(record.name == "crawl-delay" and record.block >= 0 for record in robots.records_of(group)):
        return 4
    return 3 if robots.sitemaps else 2


def _is_search(pattern: str) -> bool:
    return "?" in pattern or "search" in pattern.lower() or "query" in pattern.lower()


def _probes(rules: Iterable[Rule]) -> Iterator[bytes]:
    """Normalised paths whose verdicts tell all extents apart, never /robots.txt itself."""
    yield b"/"
    yield b"/" + _UNNAMED
    for rule in rules:
        pattern = rule.pattern.encode("utf-8", "surrogateescape")
        stem = pattern.removesuffix(b"$")
        if rule.allowed and stem.replace(b"*", b"") == ROBOTS_PATH:
            continue
        ends = (b"",) if stem != pattern else (b"", _UNNAMED)
        for filler in (b"", _UNNAMED) if b"*" in stem else (b"",):
            for end in ends:
                path = normalise(b"/" + stem.replace(b"*", filler).removeprefix(b"/") + end)
                if path != ROBOTS_PATH:
                    yield path
