"""The command line. `main` is the console script; importing this package loads typer and nothing heavy."""

from __future__ import annotations

from minitron_cli.cli.app import main

__all__ = ["main"]
