"""robots.txt by RFC 9309: which rule of a file decides whether an agent may fetch a URL.

Where the RFC is silent or files are sloppy, opt-outs that are clearly meant count, as Google's parser (the reference in
practice) has it: `Disallow /x` without its colon, the usual misspellings of Disallow, `User-agent: CCBot/2.0`. Not
followed: its equation of `/index.html` with `/`, which the RFC does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from minitron_cli.data.robots_pattern import ROBOTS_PATH, Rule, RuleSet, path_octets, target

__all__ = ["MAX_BYTES", "Record", "RobotsTxt", "Rule", "Verdict", "target"]

MAX_BYTES = 500 * 1024
"""How much of a body is read; RFC 9309, 2.5, asks for at least this."""

_AGENT = {b"user-agent", b"useragent", b"user agent"}
_ALLOW = {b"allow"}
_DISALLOW = {b"disallow", b"dissallow", b"dissalow", b"disalow", b"diasllow", b"disallaw"}
_NO_COLON = re.compile(rb"([A-Za-z-]+)[ \t]+([^ \t]+)")
_BOM = b"\xef\xbb\xbf"
_MARKUP = re.compile(rb"\s*<[!?A-Za-z]")
_MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"%PDF": "PDF", b"\x89PNG": "image", b"\xff\xd8\xff": "image"}
_TOKEN = re.compile(r"[A-Za-z0-9_-]*")
_RFC_TOKEN = re.compile(r"[A-Za-z_-]*")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a URL may be fetched, and what decided it.

    `rule`: pattern of the deciding rule as written (an octet that is no text as \\xNN), None when no rule matched.
    `line`: its number in the file, from 1.
    `group`: agent name of the group that binds the agent, as written in the file; "*"; None when no group binds it.
    """

    allowed: bool
    rule: str | None = None
    line: int | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A line that is no rule. `name` is lower case; `block`: number of the group it stands in, -1 before the first."""

    name: str
    value: str
    line: int
    block: int


class _Group:
    """All blocks that bind an agent, merged, and ready verdicts for each name that binds one."""

    __slots__ = ("_verdicts", "blocks", "name", "rules", "ruleset")

    def __init__(self, blocks: tuple[int, ...], name: str, rules: list[Rule]) -> None:
        self.blocks, self.name, self.rules = blocks, name, rules
        self.ruleset = RuleSet(rules)
        self._verdicts: dict[str, list[Verdict]] = {}

    def verdicts(self, name: str) -> list[Verdict]:
        """One verdict per rule, and last the one for a path that no rule matches."""
        found = self._verdicts.get(name)
        if found is None:
            found = [Verdict(rule.allowed, _shown(rule.pattern), rule.line, name) for rule in self.rules]
            found.append(Verdict(True, group=name))
            self._verdicts[name] = found
        return found


_UNBOUND = Verdict(True)


class RobotsTxt:
    """A parsed robots.txt.

    `rejected`: why the body is no robots.txt ("HTML", "gzip", "binary" and so on), else None; a rejected file has no
    rules and allows everything, so ask first. `size_cut`: whether the body is longer than 500 KiB, of which only the
    whole lines at the start are read. `sitemaps`: values of the Sitemap lines. `records`: every line that is no rule.
    """

    def __init__(self) -> None:
        self.rejected: str | None = None
        self.size_cut = False
        self.records: tuple[Record, ...] = ()
        self._blocks: list[list[Rule]] = []
        self._names: dict[str, tuple[str, list[int]]] = {}  # token or "*": the name as written, and its blocks
        self._bound: dict[str, tuple[int, str]] = {}  # agent: number of its group, and the name that binds it
        self._groups: list[_Group] = []

    @classmethod
    def parse(cls, body: str | bytes) -> Self:
        """Read a body; whatever it holds, nothing is raised. Octets that are no UTF-8 keep their value in paths."""
        octets = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body)
        robots = cls()
        robots.size_cut = len(octets) > MAX_BYTES
        if robots.size_cut:  # half a rule could forbid what the whole one does not
            octets = octets[: 1 + max(octets.rfind(b"\n", 0, MAX_BYTES), octets.rfind(b"\r", 0, MAX_BYTES))]
        octets = _without_bom(octets)
        robots.rejected = _not_text(octets)
        if robots.rejected is None:
            robots._read(octets)
            if not robots._blocks and _mostly_unprintable(octets):
                robots.rejected, robots.records = "binary", ()
        return robots

    def _read(self, octets: bytes) -> None:
        records: list[Record] = []
        heading = False  # whether another User-agent line would join the block; only rules end its head
        for line, name, octet_value in _lines(octets):
            value = octet_value.decode("utf-8", "surrogateescape")
            if name in _AGENT:
                if not heading:
                    self._blocks.append([])
                heading = True
                self._head(value)
            elif name in _ALLOW or name in _DISALLOW:
                heading = False
                if self._blocks and value:
                    self._blocks[-1].append(Rule(name in _ALLOW, value, line))
            else:
                records.append(Record(name.decode("utf-8", "replace"), _shown(value), line, len(self._blocks) - 1))
        self.records = tuple(records)

    def _head(self, name: str) -> None:
        """Let the last block bind what a User-agent value names.

        RFC 9309 knows letters, `_` and `-` only, which would make AI2Bot and Ai2Bot-Dolma one agent, "AI": digits
        belong to the token here. For an agent without digits the RFC's cut counts too: `CCBot2.0` is CCBot.
        """
        star = name[:1] == "*" and (len(name) == 1 or name[1].isspace())
        for token in {"*"} if star else {_token(name), _RFC_TOKEN.match(name)[0].lower()} - {""}:  # type: ignore[index]
            _, blocks = self._names.setdefault(token, ("*" if star else _shown(name), []))
            if not blocks or blocks[-1] != len(self._blocks) - 1:
                blocks.append(len(self._blocks) - 1)

    @property
    def sitemaps(self) -> tuple[str, ...]:
        """Values of the Sitemap lines, in order."""
        return tuple(value for _, value in self.lines("sitemap"))

    def lines(self, name: str) -> list[tuple[int, str]]:
        """(line number, raw value) of the records with a name, such as License; names ignore case."""
        return [(record.line, record.value) for record in self.records if record.name == name.lower()]

    def verdict(self, url: str, agent: str) -> Verdict:
        """Whether `agent` may fetch `url`."""
        number, name = self._bound.get(agent) or self._bind(agent)
        return self._groups[number].verdicts(name)[self._winner(target(url), number)] if number >= 0 else _UNBOUND

    def decide(self, path: str | bytes, group: int) -> Verdict:
        """The verdict for a path with query and a number from `group_of`: the fast path.

        `str`: as it stands in a URL, normalised here. `bytes`: must come from `target`, and is compared as it is.
        `group` in the verdict is one of the names that head the group; `token_of` tells which of them binds an agent.
        """
        if group < 0:
            return _UNBOUND
        if isinstance(path, str):
            path = path_octets(path)
        found = self._groups[group]
        return found.verdicts(found.name)[self._winner(path, group)]

    def _winner(self, path: bytes, group: int) -> int:
        return -1 if path == ROBOTS_PATH else self._groups[group].ruleset.winner(path)

    def group_of(self, agent: str) -> int:
        """The number of the merged group that binds an agent; -1 when none does. Same number, same verdicts.

        An agent is bound by every group that names its product token; by the `*` groups when none does.
        """
        return (self._bound.get(agent) or self._bind(agent))[0]

    def token_of(self, agent: str) -> str | None:
        """The name in the file, as written, by which a group binds `agent`; "*"; None when no group does."""
        number, name = self._bound.get(agent) or self._bind(agent)
        return name if number >= 0 else None

    def _bind(self, agent: str) -> tuple[int, str]:
        name, found = self._names.get(_token(agent)) or self._names.get("*") or ("", [])
        blocks = tuple(found)
        number = next((n for n, group in enumerate(self._groups) if group.blocks == blocks), -1)
        if blocks and number < 0:
            number = len(self._groups)
            self._groups.append(_Group(blocks, name, [rule for block in blocks for rule in self._blocks[block]]))
        self._bound[agent] = number, name
        return number, name

    def rules(self, group: int) -> list[Rule]:
        """The rules of a merged group, in the order of the file; none for -1."""
        return list(self._groups[group].rules) if group >= 0 else []

    def records_of(self, group: int) -> list[Record]:
        """The records that stand in a merged group's blocks, or before any group."""
        blocks = {-1, *(self._groups[group].blocks if group >= 0 else ())}
        return [record for record in self.records if record.block in blocks]


def _without_bom(octets: bytes) -> bytes:
    """Without a byte order mark, also one of which only the first octets came through."""
    for length in (3, 2, 1):
        if octets.startswith(_BOM[:length]):
            return octets[length:]
    return octets


def _not_text(octets: bytes) -> str | None:
    for start, kind in _MAGIC.items():
        if octets.startswith(start):
            return kind
    if octets[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    return "HTML" if _MARKUP.match(octets) else None


def _mostly_unprintable(octets: bytes) -> bool:
    text = octets[:1024].decode("utf-8", "replace")
    return sum(not char.isprintable() and not char.isspace() for char in text) + text.count("\ufffd") > 0.3 * len(text)


def _lines(octets: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(line number, lower-case name, value) of every record; lines end at LF, CR or both."""
    for line, text in enumerate(octets.splitlines(), 1):
        text = text.partition(b"#")[0].strip()
        name, colon, value = text.partition(b":")
        if colon:
            yield line, name.rstrip().lower(), value.strip()
        elif match := _NO_COLON.fullmatch(text):
            name = match[1].lower()
            if name in _AGENT or name in _ALLOW or name in _DISALLOW:
                yield line, name, match[2]


def _shown(value: str) -> str:
    """A value as text that can be written: an octet that is no UTF-8 as \\xNN."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _token(name: str) -> str:
    """The product token at the start of a name, in lower case; what follows it, such as a version, is ignored."""
    return _TOKEN.match(name.strip())[0].lower()  # type: ignore[index]
