"""Path patterns of robots.txt: normalised octets, `*` and `$`, the rule that wins among many (RFC 9309, 2.2.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ROBOTS_PATH = b"/robots.txt"

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_AS_IS = bytes(sorted(_UNRESERVED | set(b"!&'()+,;=:@/?[]%")))
"""Octets that stand for themselves. `*` and `$` do not: rules write literal ones as %2A and %24 (RFC 9309, 2.2.3)."""

_HEX = b"0123456789ABCDEFabcdef"
_SPELLINGS = {
    **{bytes([octet]): b"%%%02X" % octet for octet in range(256)},
    **{
        b"%%%c%c" % (high, low): bytes([octet]) if octet in _UNRESERVED else b"%%%02X" % octet
        for high in _HEX
        for low in _HEX
        for octet in [int(bytes([high, low]), 16)]
    },
}
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:(?=//))?(?://)?[^/?#]*([^#]*)")
_UNUSUAL = re.compile(rb"%[0-9A-Fa-f]{2}|[^" + re.escape(_AS_IS) + rb"]")


def normalise(path: bytes) -> bytes:
    """One spelling for each path: unreserved octets plain, reserved ones as they came, all others as upper-case %XX.

    A percent sign that starts no escape stays as it is.
    """
    if b"%" not in path and not path.translate(None, _AS_IS):
        return path
    return _UNUSUAL.sub(lambda match: _SPELLINGS[match.group()], path)


def target(url: str) -> bytes:
    """Path and query of a URL, normalised as rules are: what `RobotsTxt.decide` compares. Never raises.

    A URL may lack its scheme (`host/path`, `//host/path`) or be a bare path; an empty path is "/".
    """
    return path_octets(_URL.match(url)[1])  # type: ignore[index]  # the pattern matches anything


def path_octets(path: str) -> bytes:
    """A path with query as text, normalised: `target` for what is known to be no whole URL."""
    octets = path.encode("utf-8", "surrogatepass")
    return normalise(octets if octets.startswith(b"/") else b"/" + octets)


@dataclass(frozen=True, slots=True)
class Rule:
    """One Allow or Disallow line: `pattern` as written."""

    allowed: bool
    pattern: str
    line: int


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A compiled rule. `rank`: twice the octets of the normalised pattern, one more if it allows: the greater wins.

    `first` must start the path, `middle` follow in order, `last` end it (None: anything may follow).
    """

    rank: int
    first: bytes
    middle: tuple[bytes, ...]
    last: bytes | None
    rule: int

    def matches(self, path: bytes) -> bool:
        """Whether the path matches, in linear time for each `*`: the leftmost place of a part is always enough."""
        if not path.startswith(self.first):
            return False
        at = len(self.first)
        for part in self.middle:
            at = path.find(part, at)
            if at < 0:
                return False
            at += len(part)
        if self.last is None:
            return True
        return len(path) - len(self.last) >= at and path.endswith(self.last)


def _compile(rule: Rule, number: int) -> _Pattern:
    written = rule.pattern.encode("utf-8", "surrogateescape")
    body, anchored = (written[:-1], True) if written.endswith(b"$") else (written, False)
    parts = [normalise(part) for part in body.split(b"*")]
    octets = sum(map(len, parts)) + len(parts) - 1 + anchored - 2 * body.count(b"$")  # a raw $ counts once, not as %24
    first, *rest = parts
    last = rest.pop() if anchored and rest else None
    return _Pattern(2 * octets + rule.allowed, first, tuple(filter(None, rest)), last, number)


class RuleSet:
    """The rules of one merged group, compiled so that a verdict costs a few dictionary look-ups.

    Plain prefixes are found by hashing the path's prefixes of the lengths that occur, whole paths (`/a$`) by hashing
    the path; only patterns with `*` are tried one by one, best first, and each is skipped when its longest part is not
    in the path at all.
    """

    __slots__ = ("_lengths", "_prefixes", "_whole", "_wild")

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._prefixes: dict[bytes, _Pattern] = {}
        self._whole: dict[bytes, _Pattern] = {}
        wild: list[_Pattern] = []
        for number, rule in enumerate(rules):
            pattern = _compile(rule, number)
            if "*" in rule.pattern:
                wild.append(pattern)
                continue
            table = self._whole if rule.pattern.endswith("$") else self._prefixes
            known = table.get(pattern.first)
            if known is None or pattern.rank > known.rank:
                table[pattern.first] = pattern
        self._lengths = sorted({len(prefix) for prefix in self._prefixes}, reverse=True)
        wild.sort(key=lambda pattern: pattern.rank, reverse=True)  # stable: the first line of equals stays first
        self._wild = [(p.rank, max((p.first, *p.middle, p.last or b""), key=len), p) for p in wild]

    def winner(self, path: bytes) -> int:
        """Number of the longest rule that matches a normalised path, Allow before Disallow at a tie; -1 for none."""
        best, rule = -1, -1
        prefixes = self._prefixes
        for length in self._lengths:
            if (found := prefixes.get(path[:length])) is not None:
                best, rule = found.rank, found.rule
                break
        if self._whole and (found := self._whole.get(path)) is not None and found.rank > best:
            best, rule = found.rank, found.rule
        for rank, part, pattern in self._wild:
            if rank <= best:
                break
            if part in path and pattern.matches(path):
                return pattern.rule
        return rule
