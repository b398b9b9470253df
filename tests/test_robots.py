"""The robots.txt matcher: the failure table of published parsers, RFC 9309 line by line, and three references."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from helpers_robots import slow_allowed, slow_normal
from hypothesis import event, given, settings
from hypothesis import strategies as st
from protego import Protego

from minitron_cli.data.consent.domain import extent
from minitron_cli.data.robots import MAX_BYTES, RobotsTxt, Verdict, target
from minitron_cli.data.robots_pattern import normalise

PAGE = "https://example.com/news/2024/story.html"


def verdict(body: str | bytes, agent: str = "GPTBot", url: str = PAGE) -> Verdict:
    return RobotsTxt.parse(body).verdict(url, agent)


# --- what published parsers got wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n", id="two agents, one group"),
        pytest.param(
            "User-agent: Foo\nDisallow: /x\n\nUser-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n", id="second group"
        ),
        pytest.param("user-agent: GPTBot\ndisallow: /\n", id="lower case"),
        pytest.param("USER-AGENT: GPTBot\nDISALLOW: /\n", id="upper case"),
        pytest.param("User-agent: GPTBot\n\nDisallow: /\n", id="blank line in the group"),
        pytest.param("User-agent: GPTBot\n# why\nDisallow: /\n", id="comment in the group"),
        pytest.param("User-agent: GPTBot # the bot\nDisallow: / # all\n", id="inline comments"),
        pytest.param("User-agent: GPTBot\nDisallow: /*\n", id="/*"),
        pytest.param("User-agent: GPTBot\nDisallow: *\n", id="*"),
        pytest.param("User-agent: GPTBot\nDisallow: /\nAllow: /robots.txt\n", id="robots.txt allowed"),
        pytest.param("User-agent: gptbot\nDisallow: /\n", id="agent in lower case"),
        pytest.param("User-agent: GPTBot\nSitemap: https://a/s.xml\nUser-agent: CCBot\nDisallow: /\n", id="sitemap"),
    ],
)
def test_failure_table(body: str) -> None:
    """Each of these blocks GPTBot from the whole site, however the lines end and whichever case it is asked in."""
    for text in (body, body.replace("\n", "\r\n"), body.replace("\n", "\r"), "\ufeff" + body):
        for agent in ("GPTBot", "gptbot", "GPTBot/1.2 (+https://openai.com)"):
            assert not verdict(text, agent).allowed
            assert not verdict(text, agent, "https://example.com/").allowed
        assert extent(RobotsTxt.parse(text), "GPTBot") == "full"
        assert verdict(text, "Bingbot").allowed  # control: the block is not everybody's


# --- agents and groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "agent", "binds"),
    [
        ("Applebot", "Applebot-Extended", False),
        ("Applebot-Extended", "Applebot", False),
        ("bot", "GPTBot", False),
        ("GPT", "GPTBot", False),
        ("CCBot/2.0", "CCBot", True),
        ("CCBot", "CCBot/2.0", True),
        ("ccbot/2.0 (https://commoncrawl.org)", "CCBot", True),
        ("CCBot2.0", "CCBot", True),
        ("Kangaroo Bot", "Kangaroo Bot", True),
        ("GPTBot*", "GPTBot", True),
        ("AI2Bot", "AI2Bot", True),
        ("AI2Bot", "Ai2Bot-Dolma", False),
        ("Ai2Bot-Dolma", "AI2Bot", False),
        ("img2dataset", "IMG2dataset", True),
        ("AI2Bot", "AI", True),  # RFC 9309 ends the token before the digit
        ("Ünbot", "nbot", False),
        ("", "GPTBot", False),
        ("*", "GPTBot", True),
        ("* # all", "GPTBot", True),
        ("*bot", "GPTBot", False),
    ],
)
def test_agent_names(named: str, agent: str, binds: bool) -> None:
    assert verdict(f"User-agent: {named}\nDisallow: /\n", agent).allowed is not binds


def test_groups_of_one_agent_merge_and_star_does_not() -> None:
    robots = RobotsTxt.parse(
        "User-agent: *\nDisallow: /star\n\nUser-agent: a\nDisallow: /one\n\nUser-agent: b\nUser-agent: A/2\n"
        "Disallow: /two\n\nUser-agent: *\nDisallow: /more\n"
    )
    blocked = {path: not robots.verdict(f"https://h{path}", "a").allowed for path in ("/one", "/two", "/star", "/more")}
    assert blocked == {"/one": True, "/two": True, "/star": False, "/more": False}
    assert not robots.verdict("https://h/more", "c").allowed and not robots.verdict("https://h/star", "c").allowed
    assert robots.group_of("c") == robots.group_of("d") != robots.group_of("a") != robots.group_of("b")


def test_verdict_says_what_decided() -> None:
    robots = RobotsTxt.parse(
        "# hi\r\nUser-agent: CCBot/2.0\r\nUser-agent: *\r\n\r\nDisallow: /a\r\nAllow: /a/b # x\r\n"
    )
    assert robots.verdict("https://h/a/b", "ccbot") == Verdict(True, "/a/b", 6, "CCBot/2.0")
    assert robots.verdict("https://h/a", "Other") == Verdict(False, "/a", 5, "*")
    assert robots.verdict("https://h/z", "Other") == Verdict(True, None, None, "*")
    assert robots.group_of("ccbot") == robots.group_of("Other")
    assert RobotsTxt.parse("User-agent: a\nDisallow: /").verdict("https://h/", "b") == Verdict(True)
    assert RobotsTxt.parse("User-agent: a\nDisallow: /").group_of("b") == -1


def test_lines_outside_the_rules() -> None:
    robots = RobotsTxt.parse(
        "Disallow: /early\nSitemap: https://h/1.xml\nUser-agent: a\nCrawl-delay: 3\nUser-agent: b\nFoo: bar\n"
        "Disallow: /x\nLICENSE : https://h/l.xml\nSitemap: https://h/2.xml\n"
    )
    assert not robots.verdict("https://h/x", "a").allowed and not robots.verdict("https://h/x", "b").allowed
    assert robots.verdict("https://h/early", "a").allowed
    assert robots.sitemaps == ("https://h/1.xml", "https://h/2.xml")
    assert robots.lines("license") == [(8, "https://h/l.xml")] and robots.lines("crawl-delay") == [(4, "3")]
    assert [record.name for record in robots.records_of(robots.group_of("a"))] == [
        *("sitemap", "crawl-delay", "foo", "license", "sitemap")
    ]


@pytest.mark.parametrize("word", ["disallow", "Dissallow", "dissalow", "disalow", "diasllow", "disallaw"])
def test_misspelt_and_colonless(word: str) -> None:
    assert not verdict(f"User-agent: *\n{word}: /\n").allowed
    assert not verdict(f"user agent: *\n{word} /\n").allowed
    assert not verdict(f"useragent: GPTBot\n{word}\t/\n").allowed
    assert verdict(f"User-agent: *\n{word} all of / please\n").allowed


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("Disallow: /fish", "/fishheads", False),
        ("Disallow: /fish", "/Fish", True),
        ("Disallow: /fish/", "/fish", True),
        ("Disallow: /*.php$", "/a/b.php", False),
        ("Disallow: /*.php$", "/a/b.php?x", True),
        ("Disallow: /a$", "/a", False),
        ("Disallow: /a$", "/ab", True),
        ("Disallow: /a$b", "/a$b", False),
        ("Disallow: /a*b$", "/ab", False),
        ("Disallow: /ab*b$", "/ab", True),
        ("Disallow: /a%2Ab", "/a*b", False),
        ("Disallow: /a%2ab", "/axb", True),
        ("Disallow: /a%24", "/a$", False),
        ("Disallow: /x\nAllow: /x", "/x", True),
        ("Disallow: /x*\nAllow: /x", "/x", False),
        ("Allow: /x/y\nDisallow: /x", "/x/y/z", True),
        ("Disallow: /\nAllow: /*?lang=", "/a?lang=de", True),
        ("Disallow: /ツ", "/%E3%83%84", False),
        ("Disallow: /%e3%83%84", "/ツ", False),
        ("Disallow: /%7Ejoe", "/~joe", False),
        ("Disallow: /a%2fb", "/a/b", True),
        ("Disallow: /a%2fb", "/a%2Fb", False),
        ("Disallow: /a b", "/a%20b", False),
        ("Disallow: /100%", "/100%", False),
        ("Disallow: foo", "/foo", True),
        ("Disallow: ", "/foo", True),
        ("Disallow: /a#b", "/a", False),
        ("Disallow: /robots", "/robots.txt", True),
        ("Disallow: /", "/robots.txt", True),
        ("Disallow: /", "/robots.txt?x", False),
    ],
)
def test_paths(rules: str, path: str, allowed: bool) -> None:
    robots = RobotsTxt.parse(f"User-agent: *\n{rules}\n")
    assert robots.verdict(f"https://example.com{path}", "x").allowed is allowed
    assert robots.decide(path, robots.group_of("x")).allowed is allowed
    assert robots.decide(target(f"//example.com{path}#part"), robots.group_of("x")).allowed is allowed


def test_octets_that_are_no_utf8_keep_their_value() -> None:
    body = b"User-agent: *\nDisallow: /caf\xe9\nDisallow: /nul\x00\n"
    assert not verdict(body, url="https://h/caf%E9").allowed
    assert verdict(body, url="https://h/caf%C3%A9").allowed and verdict(body, url="https://h/nul").allowed
    assert not verdict(body, url="https://h/nul%00x").allowed
    assert verdict(body, url="https://h/caf%E9").rule == "/caf\\xe9"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://h/a?b#c", b"/a?b"),
        ("https://h", b"/"),
        ("https://h?q", b"/?q"),
        ("h/a//b", b"/a//b"),
        ("//h:80/a", b"/a"),
        ("/a", b"/a"),
        ("", b"/"),
        ("HTTP://user@[::1]:8/x y", b"/x%20y"),
        ("https://h/\udc80", b"/%ED%B2%80"),
    ],
)
def test_target(url: str, path: bytes) -> None:
    assert target(url) == path


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<!DOCTYPE html><html>\nUser-agent: *\nDisallow: /\n</html>", "HTML"),
        ("\ufeff\r\n <html><body>404</body></html>", "HTML"),
        ("<?xml version='1.0'?><Error/>", "HTML"),
        (b"\x1f\x8b\x08\x00abc", "gzip"),
        ("User-agent: *\nDisallow: /\n".encode("utf-16"), "UTF-16"),
        (bytes(range(256)) * 4, "binary"),
    ],
)
def test_rejected_bodies(body: str | bytes, reason: str) -> None:
    robots = RobotsTxt.parse(body)
    assert robots.rejected == reason
    assert robots.verdict(PAGE, "GPTBot") == Verdict(True)
    assert robots.records == ()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n\n",
        "# only a comment",
        "User-agent: *\n<br />\nDisallow: /\n",
        "Hallo Welt: ä",
        "# ä\n".encode("latin-1"),
    ],
)
def test_odd_bodies_that_are_no_other_format(body: str | bytes) -> None:
    assert RobotsTxt.parse(body).rejected is None


def test_only_whole_lines_of_500_kib_are_read() -> None:
    rule = b"Disallow: /private/area\n"
    head = b"User-agent: *\n"
    filler = b"#" * (MAX_BYTES - len(head) - 12) + b"\n"
    robots = RobotsTxt.parse(head + filler + rule)  # the limit falls into the rule, after "Disallow: /"
    assert robots.size_cut and robots.verdict("https://h/public", "x").allowed
    assert robots.verdict("https://h/private/area", "x").allowed
    fits = RobotsTxt.parse(head + b"#" * (MAX_BYTES - len(head) - len(rule) - 1) + b"\n" + rule)
    assert not fits.size_cut and not fits.verdict("https://h/private/area", "x").allowed
    assert RobotsTxt.parse(b"a" * (MAX_BYTES + 1)).size_cut


def test_many_stars_stay_fast() -> None:
    """A backtracking matcher needs ages for these."""
    patterns = ["/" + "*a" * 500 + "$", "/" + "a*" * 500 + "b", "*" * 1000 + "b", "/*" + "a" * 900 + "*b*c$"]
    robots = RobotsTxt.parse("User-agent: *\n" + "".join(f"Disallow: {p}\n" for p in patterns * 20))
    began = time.process_time()
    assert robots.verdict("https://h/" + "a" * 4000 + "c", "x").allowed
    assert time.process_time() - began < 2


# --- references -------------------------------------------------------------------------------------------------------

AGENTS = ("GPTBot", "CCBot", "Applebot", "Applebot-Extended", "AI2Bot", "Foo_Bot")
PIECES = (
    *("/", "/a", "/b", "a", "b", "ab", ".html", "index.html", "robots.txt", "?", "q=1", "&", "=", "~", "-"),
    *("%7E", "%2F", "%2f", "%61", "%3F", "%C3%A9", "é", "%", "+", "%24", "%2A", "/robots.txt", "//"),
)
paths = st.lists(st.sampled_from(PIECES), max_size=6).map(lambda parts: "/" + "".join(parts))
patterns = st.tuples(
    st.sampled_from(("/", "/", "/", "", "*")),
    st.lists(st.sampled_from((*PIECES, "*", "*", "$")), max_size=6).map("".join),
    st.sampled_from(("", "", "", "$")),
).map("".join)
lines = st.one_of(
    st.tuples(st.sampled_from(("Disallow: ", "allow:", "Disallow :", "ALLOW: ")), patterns).map("".join),
    st.sampled_from([f"User-agent: {agent}" for agent in (*AGENTS, "*", "*", "CCBot/2.0", "ccbot")]),
    st.sampled_from(("", "# note", "Sitemap: https://h/s.xml", "Crawl-delay: 1", "Foo: bar", "Disallow:", "nonsense")),
)
bodies = st.lists(lines, max_size=14).map(lambda found: "\n".join(["User-agent: *", *found]))


def _rules(body: str) -> list[str]:
    return [line.partition(":")[2].strip() for line in body.splitlines() if "allow" in line.lower()]


def _names(body: str) -> list[str]:
    return [line.partition(":")[2].strip().lower() for line in body.splitlines() if line.startswith("User-agent")]


def _other_record_in_a_head(body: str) -> bool:
    """A record that is neither rule nor Sitemap between two User-agent lines with no rule between them."""
    heading = broken = False
    for kind in (line.partition(":")[0].strip().lower() for line in body.splitlines() if ":" in line):
        if kind == "user-agent":
            if broken:
                return True
            heading = True
        elif "allow" in kind:
            heading = broken = False
        elif kind in ("crawl-delay", "foo"):
            broken = heading
    return False


PROTEGO: dict[str, Callable[[str, str, str], bool]] = {
    # It takes a name for a match at any token boundary of the agent, so Applebot binds Applebot-Extended.
    "prefix names": lambda body, path, agent: any(agent.lower().startswith(f"{name}-") for name in _names(body)),
    # It compares CCBot/2.0 whole.
    "versions": lambda body, path, agent: any(name.startswith(f"{agent.lower()}/") for name in _names(body)),
    # It lets Crawl-delay and unknown records end the head of a group; RFC 9309, 2.2.4 forbids that.
    "other records": lambda body, path, agent: _other_record_in_a_head(body),
    # It follows Google in taking /index.html for its directory.
    "index pages": lambda body, path, agent: any(rule.endswith("/index.html") for rule in _rules(body)),
    # It also reads every rule with $ as one with a literal $.
    "literal dollar": lambda body, path, agent: "%24" in path and any("$" in rule for rule in _rules(body)),
    # It decodes reserved octets, so that %3F is a question mark; RFC 9309, 2.2.2 keeps them apart.
    "reserved escapes": lambda body, path, agent: any(
        escape in text for text in (path, *_rules(body)) for escape in ("%2A", "%24", "%3F")
    ),
    # It counts the octets of a rule after escaping ? & + as well, so a rule with * or $ may come out longer or shorter.
    "octets counted": lambda body, path, agent: (
        any(char in rule for rule in _rules(body) for char in "?&+$")
        and any(char in rule for rule in _rules(body) for char in "*$")
    ),
    # It escapes ? & + in URLs, so a rule that ends in a % of no escape matches them.
    "lone percent": lambda body, path, agent: any(re.search("%(?![0-9A-Fa-f]{2})", rule) for rule in _rules(body)),
    # It allows /robots.txt with any query, too; the RFC speaks of /robots.txt.
    "robots.txt": lambda body, path, agent: path.startswith("/robots.txt?"),
}
"""Where Protego 0.7.0 answers otherwise, and why; nothing else may differ."""


@settings(max_examples=400, deadline=None)
@given(bodies, paths, st.sampled_from(AGENTS))
def test_against_references(body: str, path: str, agent: str) -> None:
    """Always as the slow reading of the RFC says; and as Protego says where no known difference applies."""
    ours = RobotsTxt.parse(body).verdict("https://example.com" + path, agent).allowed
    assert ours == slow_allowed(body.encode(), slow_normal(path.encode()), agent)
    known = next((name for name, applies in PROTEGO.items() if applies(body, path, agent)), "")
    event(f"explained: {known}" if known else "compared with protego")
    assert known or ours == Protego.parse(body).can_fetch("https://example.com" + path, agent)


@pytest.mark.parametrize(
    ("known", "body", "path", "agent", "allowed"),
    [
        ("prefix names", "User-agent: Applebot\nDisallow: /", "/x", "Applebot-Extended", True),
        ("versions", "User-agent: CCBot/2.0\nDisallow: /", "/x", "CCBot", False),
        ("other records", "User-agent: CCBot\nFoo: bar\nUser-agent: GPTBot\nDisallow: /", "/x", "CCBot", False),
        ("index pages", "User-agent: *\nDisallow: /\nAllow: /index.html", "/", "CCBot", False),
        ("literal dollar", "User-agent: *\nDisallow: /a$", "/a%24b", "CCBot", True),
        ("reserved escapes", "User-agent: *\nDisallow: /a%3Fb", "/a?b", "CCBot", True),
        ("lone percent", "User-agent: *\nDisallow: /%", "/?q", "CCBot", True),
        ("robots.txt", "User-agent: *\nDisallow: /", "/robots.txt?q", "CCBot", False),
        ("octets counted", "User-agent: *\nDisallow: /a?\nAllow: /*a*", "/a?", "CCBot", True),
    ],
)
def test_known_differences_are_real(known: str, body: str, path: str, agent: str, allowed: bool) -> None:
    assert PROTEGO[known](body, path, agent)
    assert RobotsTxt.parse(body).verdict("https://h" + path, agent).allowed is allowed
    assert Protego.parse(body).can_fetch("https://h" + path, agent) is not allowed


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300), st.text(max_size=200), st.binary(max_size=40).map(b"User-agent: *\nDisallow:/".__add__)
    ),
    st.text(max_size=60),
    st.text(max_size=20),
)
def test_never_raises(body: str | bytes, url: str, agent: str) -> None:
    robots = RobotsTxt.parse(body)
    found = robots.verdict(url, agent)
    assert found.allowed or found.rule is not None
    assert robots.decide(target(url), robots.group_of(agent)).allowed is found.allowed
    for text in (found.rule or "", found.group or "", *(record.value for record in robots.records)):
        text.encode()  # may go into a report


@given(st.binary(max_size=40))
def test_normalise(path: bytes) -> None:
    once = normalise(path)
    assert once == slow_normal(path) and normalise(once) == once
