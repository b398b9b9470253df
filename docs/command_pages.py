"""One page per command, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

from minitron_cli.cli.app import app

INDEX = """\
# Commands

Made by `make docs` from the commands themselves; do not edit by hand.

Results go to stdout, progress and messages to stderr. Every command takes `--json` (exactly one JSON object on
stdout), `--quiet` (no progress, no messages) and `--help`; they are left out of the tables.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | the input is wrong, or there is too little disk or memory; one sentence says what to do, nothing was written |
| 1 | a bug of ours, or the machine failed midway; the last valid state is kept |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the same command again continues |

`CKPT` is a local directory, a Hub id such as `owner/name`, or `builtin:tiny-py`, the small model that comes with the
installation. What starts with `/`, `.` or `~`, or exists, is never a Hub id.

`minitron --install-completion` lets the shell complete commands and options. Where stdout is not a terminal, tables
come without colours and rules; `NO_COLOR=1` leaves the colours out in a terminal. `python -m minitron_cli` is the same
program, for `torchrun`.

"""

READ_ON = {
    "inspect": ("guide", "The chain by hand"), "families": ("adding-a-family", "Adding a family"),
    "verify": ("serving", "Serving the result"), "convert": ("serving", "Serving the result"),
    "data prepare": ("guide", "The chain by hand"), "data": ("consent", "Consent"),
    "importance": ("scoring", "Scoring"), "search": ("search", "Search"), "prune": ("cutting", "Cutting"),
    "correct": ("distilling", "Distilling"), "distill": ("distilling", "Distilling"),
    "align": ("aligning", "Aligning"), "eval": ("evaluating", "Evaluating"), "bench": ("evaluating", "Evaluating"),
    "compress": ("recipes", "Recipes"), "run": ("recipes", "Recipes"), "report": ("evaluating", "Evaluating"),
    "push": ("serving", "Serving the result"), "plan": ("distributed", "Several devices"),
}  # fmt: skip
"""The page that says more, by command or the command's first word."""

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


def file_name(command: str) -> str:
    """`minitron data prepare` has the page `data-prepare.md`."""
    return command.removeprefix("minitron ").replace(" ", "-") + ".md"


def command_pages() -> dict[str, str]:
    """Name and text of every page, the index first."""
    commands = list(walk(typer.main.get_command(app)))
    lines = [f"- [`{name}`]({file_name(name)}): {_first(command.help)}" for name, command in commands]
    pages = {"index.md": INDEX + "\n".join(lines) + "\n"}
    return pages | {file_name(name): _page(name, command) for name, command in commands}


def navigation() -> str:
    """The pages as lines of mkdocs.yml, up to the comment that ends them."""
    pages = "".join(f"      - {name.removesuffix('.md').replace('-', ' ')}: commands/{name}\n" for name in _names())
    return f"{pages}      # "


def _names() -> list[str]:
    return [file_name(name) for name, _ in walk(typer.main.get_command(app))]


def _page(name: str, command: Any) -> str:
    rows = [_row(parameter) for parameter in options(command) if shown_name(parameter) not in EVERYWHERE]
    lines = [f"# {name}", "", " ".join(command.help.split()), "", "```", _usage(name, command), "```", ""]
    if rows:
        lines += ["| option | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    words = name.removeprefix("minitron ")
    more = READ_ON.get(words) or READ_ON.get(words.split()[0])
    lines += [f"More: [{more[1]}](../{more[0]}.md). " if more else ""]
    lines[-1] += "Exit codes and what holds for every command: [Commands](index.md)."
    return "\n".join(lines) + "\n"


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
