"""The documentation builds without a broken link, names every command and recipe, and what it calls runnable runs."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer.main
from browser import Browser, needs_chromium

from docs.command_pages import walk
from minitron_cli.cli.app import app
from minitron_cli.config.recipe import shipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"<!-- runnable(?: with (?P<smaller>[^>]*?))? -->\n```(?P<language>sh|python)\n(?P<code>.*?)```", re.DOTALL
)
"""A block that runs as it stands; the words after `with` replace values of options, so that it takes seconds here."""

RUNNABLE = {
    path.name: found for path in sorted(DOCS.glob("*.md")) if (found := list(BLOCK.finditer(path.read_text("utf-8"))))
}


def smaller(code: str, changes: str | None) -> str:
    """`--steps 200` becomes `--steps 2`, `steps=200` becomes `steps=2`; every change must apply."""
    words = shlex.split(changes or "")
    pairs = [
        (word.partition("=")[0], word.partition("=")[2]) for word in words if not word.startswith("--") and "=" in word
    ]
    pairs += [(word, words[place + 1]) for place, word in enumerate(words) if word.startswith("--")]
    for name, value in pairs:
        pattern = rf"{re.escape(name)} [^\s]+" if name.startswith("--") else rf"\b{name}=[\w.]+"
        joined = f"{name} {value}" if name.startswith("--") else f"{name}={value}"
        code, count = re.subn(pattern, joined, code)
        assert count, f"the block has no {name} to make smaller"
    return code


def run_shell(code: str) -> None:
    """Lines of `minitron` in this process, which has everything imported; the others in a shell."""
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["minitron"] and not set(words) & {"|", ">"}:
            try:
                app(words[1:], standalone_mode=False)
            except SystemExit as stop:
                assert not stop.code, line
        elif words:
            subprocess.run(["bash", "-ec", line], check=True)


def test_some_blocks_run() -> None:
    assert {
        "quickstart.md",
        "guide.md",
        "recipes.md",
        "evaluating.md",
        "python-api.md",
        "adding-a-loss.md",
    } <= RUNNABLE.keys()


@pytest.mark.parametrize("name", RUNNABLE)
def test_runnable_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    for block in RUNNABLE[name]:
        code = smaller(block["code"], block["smaller"])
        if block["language"] == "python":
            exec(compile(code, name, "exec"), variables)
        else:
            run_shell(code)


def test_a_block_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="minitron inspect"):
        run_shell("minitron inspect ./nothing")
    with pytest.raises(AssertionError, match="no --rounds to make smaller"):
        smaller("minitron bench x", "--rounds 1")
    assert smaller("f(steps=200, n=1)", "steps=2") == "f(steps=2, n=1)"


def commands() -> list[str]:
    return [name.removeprefix("minitron ") for name, _ in walk(typer.main.get_command(app))]


def test_every_command_and_recipe_has_its_place() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for command in commands():
        page = DOCS / "commands" / f"{command.replace(' ', '-')}.md"
        assert page.read_text("utf-8").startswith(f"# minitron {command}\n")
        assert f"commands/{page.name}\n" in navigation
    recipes = (DOCS / "recipes.md").read_text("utf-8")
    for name in shipped():
        assert f"### {name}\n" in recipes and f"minitron run {name}\n" in recipes


def test_every_command_of_a_block_exists() -> None:
    """Also in blocks that are only shown: the words after `minitron` are a command, and its options exist."""
    known = {
        name: {option for each in command.params for option in each.opts}
        for name, command in walk(typer.main.get_command(app))
    }
    wrong = []
    for path in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for block in re.findall(r"```(?:sh)?\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            for line in re.findall(r"^\s*(minitron [a-z].*)$", block.replace("\\\n", " "), re.MULTILINE):
                words = shlex.split(line.split("|")[0], comments=True)
                name = next((" ".join(words[:size]) for size in (4, 3, 2) if " ".join(words[:size]) in known), None)
                used = {word.partition("=")[0] for word in words if word.startswith("--")}
                if name is None or used - known[name] - {"--help"}:
                    wrong.append(f"{path.name}: {line}")
    assert not wrong


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # --quiet would hide warnings from --strict, too
    return out


def test_the_site_builds_without_a_broken_link(site: Path) -> None:
    assert (site / "index.html").is_file() and (site / "commands" / "eval.html").is_file()
    assert not list(site.rglob("*.py"))
    assert (DOCS / "images" / "report.png").stat().st_size < 200_000


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Nothing on stderr."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_chromium
def test_pages_in_a_browser(site: Path) -> None:
    with served(site) as address, Browser() as browser:
        for name in ("index", "concepts", "recipes", "commands/eval", "benchmarks"):
            page = browser.open(f"{address}/{name}.html", width=390)
            assert page.console == [], name
            assert not [url for url in page.requests if not url.startswith((address, "data:", "blob:"))], name
            wide, there = page.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide <= there, name
            assert page.ask("[...document.images].every((each) => each.complete && each.naturalWidth && each.alt)"), (
                name
            )
