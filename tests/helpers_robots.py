"""Reads the labelled robots.txt cases, which come as text-format protocol buffers."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN = re.compile(rb'\s+|#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>\w+)|(?P<mark>[\[\]{}:,])', re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One expectation; `name` is file#body.case, counted from 1."""

    name: str
    body: bytes
    url: str
    agent: str
    allowed: bool
    standard: bool


def read_cases(folder: Path) -> list[Case]:
    """Every expectation of the .textproto files below a folder, sorted by file."""
    return [case for path in sorted(folder.rglob("*.textproto")) for case in _cases(path)]


def _cases(path: Path) -> Iterator[Case]:
    tokens = [(m.lastgroup, m.group()) for m in _TOKEN.finditer(path.read_bytes()) if m.lastgroup]
    fields = _message(tokens, 0)[0]
    for number, (body, expectations) in enumerate(
        ((_text(test, "robotstxt"), _flat(test, "test_expectations")) for test in _flat(fields, "tests")), 1
    ):
        for index, case in enumerate(expectations, 1):
            url, agent, outcome = (
                _text(case, name).decode("utf-8") for name in ("testurl", "useragent", "expected_outcome")
            )
            standard = _text(case, "test_type") != b"GOOGLE_SPECIFIC"
            assert outcome in ("ALLOWED", "DISALLOWED"), (path, outcome)
            yield Case(f"{path.stem}#{number}.{index}", body, url, agent, outcome == "ALLOWED", standard)


def _message(tokens: list[tuple[str | None, bytes]], at: int) -> tuple[list[tuple[str, Any]], int]:
    """Fields up to the closing brace: (name, value), and the place after it."""
    fields: list[tuple[str, Any]] = []
    while at < len(tokens) and tokens[at][1] != b"}":
        if tokens[at][1] == b",":
            at += 1
            continue
        name = tokens[at][1].decode()
        at += 2 if tokens[at + 1][1] == b":" else 1
        value, at = _value(tokens, at)
        fields.append((name, value))
    return fields, at + 1


def _value(tokens: list[tuple[str | None, bytes]], at: int) -> tuple[Any, int]:
    kind, token = tokens[at]
    if token == b"{":
        return _message(tokens, at + 1)
    if token == b"[":
        values, at = [], at + 1
        while tokens[at][1] != b"]":
            if tokens[at][1] == b",":
                at += 1
                continue
            value, at = _value(tokens, at)
            values.append(value)
        return values, at + 1
    text = b""
    while kind == "string":  # neighbouring strings are one
        text += codecs.escape_decode(token[1:-1])[0]
        at += 1
        kind, token = tokens[at] if at < len(tokens) else (None, b"")
    return (text, at) if text or tokens[at - 1][0] == "string" else (token, at + 1)


def _flat(fields: list[tuple[str, Any]], name: str) -> list[Any]:
    """Values of a repeated field, however it was spelled."""
    found = []
    for key, value in fields:
        if key == name:
            found.extend(value if value and isinstance(value[0], list) else [value])
    return found


def _text(fields: list[tuple[str, Any]], name: str) -> bytes:
    return next((value for key, value in fields if key == name), b"")


# --- the RFC once more, slowly: what the fast matcher is pinned to ----------------------------------------------------

_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
_KEPT = _PLAIN + b"!&'()+,;=:@/?[]"


def slow_normal(path: bytes) -> bytes:
    """RFC 9309, 2.2.2, octet by octet."""
    out, at = b"", 0
    while at < len(path):
        octet, step, escaped = path[at], 1, False
        if re.fullmatch(rb"%[0-9a-fA-F]{2}", path[at : at + 3]):
            octet, step, escaped = int(path[at + 1 : at + 3], 16), 3, True
        literal = octet in _PLAIN if escaped else octet in _KEPT or octet == 0x25
        out += bytes([octet]) if literal else b"%%%02X" % octet
        at += step
    return out


def slow_allowed(body: bytes, path: bytes, token: str) -> bool:
    """Whether an agent may fetch a path: all groups read anew, every rule tried as a regular expression."""
    groups: list[tuple[list[str], list[tuple[bool, bytes]]]] = []
    rules_seen = True
    for line in re.split(rb"\r\n|\r|\n", body):
        name, colon, value = line.split(b"#")[0].partition(b":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name == b"user-agent":
            if rules_seen:
                groups.append(([], []))
            rules_seen = False
            groups[-1][0].append(re.match(r"\*?[A-Za-z0-9_-]*", value.decode("latin-1"))[0].lower())
        elif name in (b"allow", b"disallow"):
            rules_seen = True
            if groups and value:
                groups[-1][1].append((name == b"allow", value))
    named = [rules for names, rules in groups if token.lower() in names]
    chosen = named or [rules for names, rules in groups if "*" in names]
    best = (-1, True)
    for allowed, pattern in (rule for rules in chosen for rule in rules):
        stem = pattern[:-1] if pattern.endswith(b"$") else pattern
        regex = b".*".join(re.escape(slow_normal(part)) for part in stem.split(b"*"))
        regex += rb"\Z" if stem != pattern else b""
        if re.match(regex, path, re.DOTALL):
            plain = stem.replace(b"*", b"-").replace(b"$", b"-")
            best = max(best, (len(slow_normal(plain)) + (stem != pattern), allowed))
    return best[1] or path == b"/robots.txt"
