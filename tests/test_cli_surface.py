"""The command line is frozen: option names change only together with tests/cli_surface.json and the pages of docs/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import minitron_cli
from docs.command_pages import walk
from docs.generate import pages
from minitron_cli.cli.app import app

HERE = Path(__file__).parent
FROZEN = HERE / "cli_surface.json"
CONTRACT = {
    "inspect": ["CHECKPOINT"],
    "families": [],
    "verify": ["CHECKPOINT"],
    "doctor": [],
    "data prepare": ["SOURCES", "--tokenizer", "--out", "--seq-len"],
    "data audit": ["SOURCE", "--robots", "--out", "--filter", "--unknown", "--agents", "--as-of"],
    "data robots fetch": ["--from", "--out"],
    "data robots import": ["PATH", "--out"],
    "importance": ["CHECKPOINT", "--data", "--out"],
    "search": [
        *("CHECKPOINT", "--importance", "--data", "--out"),
        *("--params", "--tolerance", "--params-range", "--grid", "--list"),
    ],
    "prune": [
        *("CHECKPOINT", "--out", "--importance", "--plan", "--search"),
        *("--layers", "--hidden", "--ffn", "--heads", "--kv-heads", "--dry-run"),
    ],
    "distill": [
        *("STUDENT", "--teacher", "--data", "--out"),
        *("--steps", "--tokens", "--batch-size", "--save-every", "--seed"),
    ],
    "eval": ["CHECKPOINT", "--tasks", "--data-dir", "--limit", "--out"],
    "compress": ["CHECKPOINT", "--params", "--data", "--out"],
    "run": ["RECIPE", "--out", "--set", "--dry-run"],
    "report": ["RUN"],
}
"""What users and other programs rely on; the frozen list may grow, these names stay."""


COMMANDS: dict[str, Any] = {
    name.removeprefix("minitron "): command for name, command in walk(typer.main.get_command(app))
}


def surface() -> dict[str, list[str]]:
    """Command to the sorted names of its arguments and options."""
    return {
        name: sorted(
            word
            for parameter in command.params
            for word in (
                [parameter.name.upper()]
                if parameter.param_type_name == "argument"
                else [*parameter.opts, *parameter.secondary_opts]
            )
        )
        for name, command in sorted(COMMANDS.items())
    }


def test_options_are_frozen() -> None:
    frozen = json.loads(FROZEN.read_text("utf-8"))
    assert surface() == frozen, (
        f"The command line changed. If it was meant: `{Path(sys.executable).name} -m tests.test_cli_surface` writes "
        f"{FROZEN.name} anew, `make docs` the pages, and CHANGELOG.md says so."
    )


@pytest.mark.parametrize("command", CONTRACT)
def test_contract(command: str) -> None:
    names = surface()[command]
    assert set(CONTRACT[command]) | {"--json", "--quiet"} <= set(names)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command: str) -> None:
    """Every command and every option says what it is for; sentences end with a full stop."""
    assert COMMANDS[command].help and COMMANDS[command].help.strip()[-1] in ".?"
    for parameter in COMMANDS[command].params:
        assert parameter.help, f"{command}: {parameter.name} has no help"
        assert parameter.help.strip().endswith("."), f"{command}: the help of {parameter.name} is not a sentence"


def test_docs_are_up_to_date() -> None:
    for path, text in pages().items():
        assert path.read_text("utf-8") == text, f"{path.name} is out of date; run `python -m docs.generate`"


def test_readme_names_every_command() -> None:
    text = (HERE.parent / "README.md").read_text("utf-8")
    missing = [command for command in COMMANDS if f"`minitron {command}" not in text]
    assert not missing, f"README.md does not name {missing}"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["data", "prepare", "--help"], ["--version"]])
def test_help_is_light(words: list[str]) -> None:
    heavy = ["torch", "transformers", "numpy", "datasets", "lm_eval"]
    if len(words) == 1:
        heavy.append("pydantic")  # typer itself loads it to parse a command's words
    code = (
        "import sys, atexit\n"
        f"heavy = {heavy}\n"
        "atexit.register(lambda: print('LOADED', [name for name in heavy if name in sys.modules]))\n"
        f"sys.argv = ['minitron', *{words!r}]\n"
        "from minitron_cli.cli import main\n"
        "main()\n"
    )
    assert run("-c", code).splitlines()[-1] == "LOADED []"


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "pydantic", "typer")
    code = f"import sys, minitron_cli; print([name for name in {heavy} if name in sys.modules])"
    assert run("-c", code).strip() == "[]"


def test_module_and_version() -> None:
    assert run("-m", "minitron_cli", "--version") == f"minitron {minitron_cli.__version__}\n"


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(surface(), indent=1) + "\n", "utf-8")
