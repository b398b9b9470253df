"""`minitron data ...`"""

from __future__ import annotations

from typing import Any

import typer

from minitron_cli.cli.command import add_stage
from minitron_cli.config.data import DataConfig


def _run(config: DataConfig) -> Any:
    from minitron_cli.data.prepare import run_data

    return run_data(config)


def _show(result: dict[str, Any]) -> str:
    lines = [f"{result['out']}: {result['tokens']:,} tokens of {result['documents']:,} documents"]
    for name, split in result["splits"].items():
        lines.append(f"  {name:<11}{split['sequences']:>9,} sequences  {split['tokens']:>13,} tokens")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Prepare training text.", no_args_is_help=True)
    add_stage(group, "prepare", DataConfig, _run, _show)
    app.add_typer(group, name="data")
