"""What commands print: plain text in files and pipes, rules and colours on a terminal, nothing wider than it."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest

from minitron_cli.runtime.table import Table, plain, put

TABLE = Table(("task", "value"), [("mmlu", "0.25"), ("  mmlu_stem", "0.3")], strong=[0])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, *, columns: int = 60, **environment: str) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    put(["first [line]", TABLE], stream)
    return stream.getvalue()


def test_text_is_aligned() -> None:
    assert plain(["a", TABLE]) == "a\ntask         value\nmmlu          0.25\n  mmlu_stem    0.3"
    assert str(Table(("", ""), [("python", "3"), ("cpu", "x")], left=2)) == "python  3\ncpu     x"
    stream = io.StringIO()
    put(["a", TABLE], stream)
    assert stream.getvalue() == plain(["a", TABLE]) + "\n"


def test_a_terminal_gets_rules_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch)
    assert text.startswith("first [line]\n") and "─" in text and "\x1b[1;36m" in text and "\x1b[1m" in text
    plainer = shown(monkeypatch, NO_COLOR="1")
    assert "─" in plainer and "36m" not in plainer


def test_a_table_wider_than_the_terminal_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, columns=12)
    assert "\x1b" not in text and "  mmlu_stem    0.3" in text


def minitron(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minitron_cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_pipe_gets_no_escape_codes() -> None:
    done = minitron("families", TERM="xterm-256color")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split() == ["family", "model", "types", "can", "cut"]


def test_a_real_terminal_and_json_on_it() -> None:
    """Under a pseudo-terminal the table is ruled; --json stays one object."""
    for words, ruled in ((["families"], True), (["families", "--json"], False)):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "minitron_cli", *words]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "250", "NO_COLOR": ""}
        process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
        os.close(theirs)
        found = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # Linux says so at the end of a terminal's output
                break
            if not block:
                break
            found += block
        process.wait()
        os.close(ours)
        assert (b"\xe2\x94\x80" in found) == ruled
        if not ruled:
            assert "families" in json.loads(found)


def completed(**environment: str) -> str:
    """What the installed command answers to a shell that asks for completions."""
    code = "import sys; sys.argv = ['minitron']; from minitron_cli.cli import main; main()"
    words = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=words).stdout


def test_completion() -> None:
    assert "complete -o default -F" in completed(_MINITRON_COMPLETE="source_bash")
    asked = {"COMP_WORDS": "minitron eval --ta", "COMP_CWORD": "2"}
    assert completed(_MINITRON_COMPLETE="complete_bash", **asked).split() == ["--tasks"]
