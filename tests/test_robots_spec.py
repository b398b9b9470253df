"""The labelled cases of google/robotstxt-spec-test: every one passes, or is named here with the reason."""

from __future__ import annotations

import pytest
from helpers import SHARED
from helpers_robots import read_cases

from minitron_cli.data.robots import RobotsTxt

FOLDER = SHARED / "robots" / "google_spec_test" / "CTC"

ROBOTS_PATH = "RFC 9309, 2.2.2: the /robots.txt URI is implicitly allowed."
ENCODING = "RFC 9309, 2.2.2: octets outside ASCII are percent-encoded on both sides before they are compared."
UNRESERVED = "RFC 9309, 2.2.2: %62%61%7A in a path is compared as baz (an example of its table)."
DIGITS = (
    "Not ruled out by the RFC, whose grammar (2.2.1) knows no names with digits; the case wants the group AB42bot "
    "not to bind the agent AB42bot. An opt-out that names AI2Bot must bind AI2Bot."
)
STANDARD = {
    "non-ascii-paths#2.2": ENCODING,
    "non-ascii-paths#3.2": ENCODING,
    "non-ascii-paths#4.1": UNRESERVED,
    "327748#1.6": ROBOTS_PATH,
    "369883#1.6": ROBOTS_PATH,
    "369883#1.10": ROBOTS_PATH,
    "860237#1.10": ROBOTS_PATH,
    "369883#1.7": DIGITS,
    "369883#1.8": DIGITS,
}
"""Cases that expect something else than we answer."""

GOOGLE = {
    "index-page#1.1": "Google takes /index.html for its directory; the RFC does not.",
    "user-agent-name#1.2": "Google refuses to look up 'Foo Bar'; here every name is cut to its token, as in files.",
}


@pytest.mark.shared_data
@pytest.mark.skipif(not FOLDER.is_dir(), reason="the labelled cases are not here")
def test_labelled_cases(capsys: pytest.CaptureFixture[str]) -> None:
    cases = read_cases(FOLDER)
    assert (len(cases), sum(case.standard for case in cases), sum(case.allowed for case in cases)) == (400, 378, 204)
    wrong = {
        case.name: case
        for case in cases
        if RobotsTxt.parse(case.body).verdict(case.url, case.agent).allowed != case.allowed
    }
    standard = {name for name, case in wrong.items() if case.standard}
    with capsys.disabled():
        print(f"\nrobots.txt cases: STANDARD {378 - len(standard)} of 378, ", end="")
        print(f"GOOGLE_SPECIFIC {22 - len(wrong.keys() - standard)} of 22")
    assert standard == STANDARD.keys()
    assert wrong.keys() - standard == GOOGLE.keys()


@pytest.mark.shared_data
@pytest.mark.skipif(not FOLDER.is_dir(), reason="the labelled cases are not here")
def test_the_reasons_hold() -> None:
    """The cases set aside do ask for /robots.txt, have an escape or a raw octet, or have digits in the agent."""
    cases = {case.name: case for case in read_cases(FOLDER)}
    for name, reason in STANDARD.items():
        case = cases[name]
        assert (reason == ROBOTS_PATH) == case.url.endswith("/robots.txt")
        assert (reason == DIGITS) == any(char.isdigit() for char in case.agent)
        assert (reason in (ENCODING, UNRESERVED)) == (b"%" in case.body or not case.url.isascii())
