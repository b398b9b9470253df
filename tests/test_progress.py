"""Progress lines are for people: rate, time left, short numbers, silence when asked."""

from __future__ import annotations

import pytest

from minitron_cli.runtime import progress
from minitron_cli.runtime.progress import Progress, duration, quantity, say, set_quiet


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (125, "2m05s"), (7800, "2h10m"), (367000, "4d05h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (5431, "5.43k"), (1_200_000, "1.2M"), (8.3e9, "8.3B")])
def test_quantity(number: float, text: str) -> None:
    assert quantity(number) == text


def test_line_counts_only_this_run_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run of 100 steps that starts at 50 and did 10 in 5 s has 40 left: 20 s."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress("distill", 100, "steps", start=50, rate_unit="tokens")
    now[0] = 105.0
    bar.advance(10, rated=5000, note="loss 2.3")
    assert bar.line() == "distill  60/100 steps  60%  1k tokens/s  20s left  loss 2.3"


def test_large_counts_are_short() -> None:
    assert "0/715M bytes" in Progress("prune", 715_180_032, "bytes").line()


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(True)
    say("hello")
    with Progress("x", 1, "steps") as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    set_quiet(False)
    say("hello")
    assert capsys.readouterr().err == "hello\n"
