"""Write what the docs say of commands and families from the code: `python -m docs.generate` (`--check` compares)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

from docs.families import between_marks, matrix
from minitron_cli.cli.app import app

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# Command line

Made by `make docs` from the commands themselves; do not edit by hand.

Results go to stdout, progress and messages to stderr. Every command takes `--json` (exactly one JSON object on
stdout), `--quiet` (no progress, no messages) and `--help`; they are left out of the tables below.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the input is wrong, or there is too little disk or memory; one sentence says what to do, nothing was written |
| 1 | a bug of ours, or the machine failed midway; the last valid state is kept |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the same command again continues |

`CKPT` is a local directory, a Hub id such as `owner/name`, or `builtin:tiny-py`, the small model that comes with the
installation. What starts with `/`, `.` or `~`, or exists, is never a Hub id.
"""

EVERYWHERE = {"--json", "--quiet", "--help"}
VALUES = {int: "`N`", float: "`X`", Path: "`PATH`", str: "`TEXT`", bool: ""}


def walk(command: Any, name: str = "minitron") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that call it, in the order of `--help`."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    if command.invoke_without_command:  # a group that does something on its own
        yield name, command
    for word, child in children.items():
        yield from walk(child, f"{name} {word}")


def options(command: Any) -> list[Any]:
    """The parameters of one command, arguments first."""
    return sorted(command.params, key=lambda parameter: parameter.param_type_name != "argument")


def shown_name(parameter: Any) -> str:
    """`CHECKPOINT` for an argument, `--out` for an option."""
    return parameter.name.upper() if parameter.param_type_name == "argument" else str(parameter.opts[0])


def page() -> str:
    """The text of docs/cli.md."""
    commands = list(walk(typer.main.get_command(app)))
    contents = [f"- [`{name}`](#{name.replace(' ', '-')}): {_first(command.help)}" for name, command in commands]
    return "\n".join([HEAD, *contents, "", *(_section(name, command) for name, command in commands)])


def _section(name: str, command: Any) -> str:
    rows = [_row(parameter) for parameter in options(command) if shown_name(parameter) not in EVERYWHERE]
    lines = [f"## {name}", "", " ".join(command.help.split()), "", f"    {_usage(name, command)}", ""]
    if rows:
        lines += ["| option | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _usage(name: str, command: Any) -> str:
    words = [name]
    for parameter in options(command):
        if parameter.param_type_name == "argument":
            words.append(shown_name(parameter) + ("..." if parameter.nargs == -1 else ""))
        elif parameter.required:
            words.append(f"{shown_name(parameter)} {parameter.name.upper()}")
    return " ".join([*words, "[OPTIONS]"])


def _row(parameter: Any) -> str:
    help = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return f"| `{shown_name(parameter)}` | {_value(parameter)} | {_default(parameter)} | {help} |"


def _value(parameter: Any) -> str:
    hint = parameter.type_descriptor.annotation
    repeated = get_origin(hint) is list
    if repeated:
        hint = get_args(hint)[0]
    inner = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is not Literal and len(inner) == 1:  # an optional value
        hint = inner[0]
    text = ", ".join(f"`{word}`" for word in get_args(hint)) if get_origin(hint) is Literal else VALUES[hint]
    return f"{text}, repeatable" if repeated and parameter.param_type_name == "option" else text


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default == []:
        return ""
    return f"`{parameter.default}`"


def _first(text: str) -> str:
    """The first sentence, without its full stop."""
    return " ".join(text.split()).split(". ")[0].rstrip(".")


def pages() -> dict[Path, str]:
    """Every generated file and its text; the README is generated between two marks only."""
    readme = Path(__file__).parents[1] / "README.md"
    return {PAGE: page(), readme: between_marks(readme.read_text("utf-8"), matrix())}


def main() -> None:
    """Write the pages, or with --check fail where one on disk differs."""
    for path, text in pages().items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            raise SystemExit(f"{path.name} is out of date; run `make docs`.")


if __name__ == "__main__":
    main()
