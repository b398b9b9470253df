"""`minitron families`: what is supported; `minitron families draft`: a file for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minitron_cli.cli.run import execute
from minitron_cli.cli.words import Json, Quiet, Ref
from minitron_cli.runtime.table import Table

Out = Annotated[Path | None, typer.Option("--out", help="Python file to write; without it the draft is printed.")]


def families(context: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
    """What is supported, per axis."""
    if context.invoked_subcommand is None:
        execute(_supported, quiet=quiet, as_json=json, show=_show_supported)


def _supported() -> dict[str, Any]:
    from minitron_cli.families import FAMILIES

    return {
        "families": [
            {
                "name": family.name,
                "model_types": list(family.model_types),
                "axes": [] if family.draft else [axis.name for axis in family.axes if axis.prunable],
            }
            for family in FAMILIES
        ]
    }


def _show_supported(found: dict[str, Any]) -> list[str | Table]:
    rows = [
        (family["name"], ", ".join(family["model_types"]), ", ".join(family["axes"]) or "inspect only")
        for family in found["families"]
    ]
    return [Table(("family", "model types", "can cut"), rows, left=3)]


def draft(checkpoint: Ref, out: Out = None, json: Json = False, quiet: Quiet = False) -> None:
    """Draft a family file: build the stock model without weights, change one number of the config at a time."""

    def body() -> dict[str, Any]:
        from minitron_cli.models.draft_source import write_draft

        return write_draft(checkpoint, out)

    execute(body, quiet=quiet, as_json=json, show=_show_draft)


def _show_draft(found: dict[str, Any]) -> str:
    if found["out"] is None:
        return str(found["source"]).rstrip("\n")
    return f"{found['out']}: {found['tensors']} tensor names, {found['checks']} lines marked CHECK"


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(invoke_without_command=True, callback=families)
    group.command()(draft)
    app.add_typer(group, name="families")
