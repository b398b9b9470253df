"""All commands. Each file beside this one registers its own; nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from minitron_cli import __version__
from minitron_cli.cli import data, inspect, stages
from minitron_cli.cli.run import enter
from minitron_cli.runtime.threads import yield_while_waiting

app = typer.Typer(
    name="minitron",
    help="Turn one trained Hugging Face causal LM into smaller ones: score, prune, search, distil, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"minitron {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    pass


inspect.register(app)
data.register(app)
stages.register(app)


def main() -> None:
    """The console script."""
    yield_while_waiting()
    enter(app)
