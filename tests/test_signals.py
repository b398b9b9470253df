"""Consent signals beside robots.txt: each kind, their order, and what is made of all of them together."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_cli.data.consent.signals import Decision, Signal, SiteSignals, combine, signals_of
from minitron_cli.data.robots import RobotsTxt, Verdict


def read(
    robots: str = "", path: str = "/x", headers: dict[str, str] | None = None, tdmrep: object = None, agent: str = "*"
) -> dict[tuple[str, str], bool | None]:
    body = json.dumps(tdmrep).encode() if tdmrep is not None else None
    found = signals_of(RobotsTxt.parse(robots), f"https://h{path}", headers or {}, body, agent)
    assert len({(signal.source, signal.purpose) for signal in found}) == len(found)
    return {(signal.source, signal.purpose): signal.allowed for signal in found}


DRAFT = """User-Agent: *
Allow: /
Disallow: /never/
Content-Usage: / train-ai=n
Content-Usage: /ai-ok/ train-ai=y

User-Agent: ExampleBot
Allow: /
Content-Usage: / train-ai=y
"""
"""The example of the attachment draft, with its table below."""


@pytest.mark.parametrize(
    ("path", "agent", "allowed"),
    [
        ("/test", "*", False),
        ("/never/test", "*", None),
        ("/ai-ok/test", "*", True),
        ("/test", "ExampleBot", True),
        ("/test", "OtherBot", False),
    ],
)
def test_content_usage_draft(path: str, agent: str, allowed: bool | None) -> None:
    assert read(DRAFT, path, agent=agent).get(("content-usage", "training")) is allowed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Content-Usage: train-ai=n, search=y", {"training": False, "search": True}),
        ("content-usage : /\ttrain-ai=n", {"training": False}),
        ("Content-Usage: / train-ai=n;exception=1", {"training": False}),
        ("Content-Usage: /other train-ai=n", {}),
        ("Content-Usage: train-ai=maybe, bots=n", {}),
        ("Content-Usage: train-ai=y\nContent-Usage: / train-ai=n", {"training": False}),
        ("Content-Usage: train-ai=n\nContent-Usage: train-ai=y", {"training": False}),
        ("Content-Usage: genai=n", {"training": False}),
    ],
)
def test_content_usage_lines(line: str, expected: dict[str, bool]) -> None:
    assert read(f"User-agent: *\n{line}\n") == {("content-usage", key): value for key, value in expected.items()}


def test_content_signal() -> None:
    body = "User-Agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /\n\nUser-agent: Own\nDisallow:\n"
    assert read(body) == {("content-signal", "search"): True, ("content-signal", "training"): False}
    assert read(body, agent="Own") == {}  # a group of one's own does not inherit
    assert read("User-agent: *\nContent-signal: ai-input=no") == {("content-signal", "input"): False}
    before = "Content-Signal: ai-train=no\nUser-agent: Own\nDisallow: /y\n"
    assert read(before, agent="Own") == read(before) == {("content-signal", "training"): False}


def test_rsl() -> None:
    assert read("License: https://h/l.xml\nUser-agent: *\nDisallow:") == {("rsl", "training"): None}
    link = {"Link": '<https://h/l.xml>; rel="license"; type="application/rsl+xml"'}
    assert read(headers=link) == {("rsl", "training"): None}
    assert read(headers={"Link": '<https://h/s.css>; rel="preload"'}) == {}


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ([{"location": "/", "tdm-reservation": 1}], "/a", False),
        ([{"location": "/a", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}], "/a/b", True),
        ([{"location": "/", "tdm-reservation": 1}, {"location": "/a/long", "tdm-reservation": 0}], "/a/long", False),
        ([{"location": "*.pdf$", "tdm-reservation": 1}], "/x/y.pdf", False),
        ([{"location": "*.pdf$", "tdm-reservation": 1}], "/x/y.html", None),
        ([{"location": "/", "tdm-reservation": 7}, {"location": "/", "tdm-reservation": 1}], "/a", None),
        ([{"location": "/", "tdm-reservation": True}], "/a", None),
        ([{"location": "/", "tdm-reservation": "1"}], "/a", False),
        ({"location": "/", "tdm-reservation": 1}, "/a", False),
        ([5, {"location": 3}, {"tdm-reservation": 1}], "/a", None),
        ("text", "/a", None),
    ],
)
def test_tdmrep_takes_the_first_match(rules: object, path: str, allowed: bool | None) -> None:
    assert read(path=path, tdmrep=rules).get(("tdmrep", "tdm")) is allowed


def test_tdm_header_overrides_the_file_and_its_absence_does_not() -> None:
    reserved = [{"location": "/", "tdm-reservation": 1}]
    assert read(headers={"TDM-Reservation": "0"}, tdmrep=reserved) == {("tdm-header", "tdm"): True}
    assert read(headers={"tdm-reservation": "?"}, tdmrep=reserved) == {("tdmrep", "tdm"): False}
    assert read(tdmrep=reserved) == {("tdmrep", "tdm"): False}


@pytest.mark.parametrize(
    ("value", "agent", "purposes"),
    [
        ("noai, noimageai", "*", {"training", "image"}),
        ("NOAI", "*", {"training"}),
        ("noindex", "*", {"search"}),
        ("otherbot: noai", "*", set()),
        ("otherbot: noai", "OtherBot", {"training"}),
        ("noai, otherbot: noindex, noimageai", "*", {"training"}),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", "*", {"training"}),
        ("all, max-snippet: 20", "*", set()),
    ],
)
def test_x_robots_tag(value: str, agent: str, purposes: set[str]) -> None:
    assert read(headers={"X-Robots-Tag": value}, agent=agent) == {("x-robots-tag", name): False for name in purposes}


def test_a_silent_site_is_empty() -> None:
    assert SiteSignals(RobotsTxt.parse("User-agent: *\nDisallow: /\n"), {"Server": "x"}, None).empty
    assert SiteSignals(RobotsTxt.parse(""), {}, b"[]").empty
    assert not SiteSignals(RobotsTxt.parse(DRAFT), {}, None).empty


@given(st.text(max_size=80), st.text(max_size=40), st.binary(max_size=60))
def test_never_raises(value: str, tag: str, tdmrep: bytes) -> None:
    robots = RobotsTxt.parse(f"User-agent: *\nContent-Usage: {value}\nContent-Signal: {value}\nLicense: {value}")
    headers = {"X-Robots-Tag": tag, "Content-Usage": tag, "Link": value, "tdm-reservation": value}
    combine(None, signals_of(robots, value, headers, tdmrep))


def test_deep_json_is_no_crash() -> None:
    assert signals_of(RobotsTxt.parse(""), "https://h/", {}, b"[" * 100_000) == []


# --- together ---------------------------------------------------------------------------------------------------------

NO = Signal("content-signal", "training", False, "Content-Signal: ai-train=no")
YES = Signal("content-usage", "training", True, "Content-Usage: train-ai=y")
MINING = Signal("tdmrep", "tdm", False, "tdmrep.json: / 1")
SEARCH = Signal("content-signal", "search", False, "Content-Signal: search=no")
TERMS = Signal("rsl", "training", None, "License: https://h/l.xml")
ALLOW, DISALLOW, SILENT = Verdict(True, "/a", 2, "*"), Verdict(False, "/", 2, "*"), Verdict(True, group="*")


def test_strictest_wins() -> None:
    assert combine(SILENT, []) == combine(None, []) == Decision(True)
    assert combine(SILENT, [NO]) == Decision(False, (NO.where,))
    assert combine(None, [MINING]) == Decision(False, (MINING.where,))
    assert combine(DISALLOW, []) == Decision(False, ("Disallow: /",))
    assert combine(SILENT, [SEARCH]).allowed and not combine(SILENT, [SEARCH], purpose="search").allowed
    assert combine(SILENT, [TERMS]) == Decision(True, unread=(TERMS.where,))


def test_conflicts_are_reported() -> None:
    decision = combine(ALLOW, [NO])
    assert not decision.allowed
    assert decision.conflicts == ("'Allow: /a' permits training, 'Content-Signal: ai-train=no' refuses it.",)
    assert len(combine(DISALLOW, [YES]).conflicts) == 1 and not combine(DISALLOW, [YES]).allowed
    assert combine(SILENT, [NO]).conflicts == ()


def test_robots_alone() -> None:
    decision = combine(ALLOW, [NO, TERMS], rule="robots")
    assert decision.allowed and decision.by == () and len(decision.conflicts) == 1 and decision.unread == (TERMS.where,)
    assert not combine(DISALLOW, [YES], rule="robots").allowed
