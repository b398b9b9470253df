"""`minitron inspect`, `verify`, `families`, `doctor`: look, never write."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from minitron_cli.cli.run import execute

Ref = Annotated[str, typer.Argument(help="Checkpoint: directory, Hub id or builtin:tiny-py.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no messages.")]


def inspect(checkpoint: Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Shape, parameters, memory and prunable axes; config.json alone is enough."""

    def body() -> dict[str, Any]:
        from minitron_cli.checkpoint.inspect import inspect_checkpoint

        return inspect_checkpoint(checkpoint)

    execute(body, quiet=quiet, as_json=json, show=_show_inspect)


def _show_inspect(found: dict[str, Any]) -> str:
    shape = "  ".join(f"{name} {value:,}" for name, value in found["shape"].items())
    lines = [
        f"{found['path']}",
        f"  family      {found['family']}" + ("" if found["axes"] else "  (inspect only: its cuts are not proven yet)"),
        f"  parameters  {found['params']:,}  ({found['params_non_embedding']:,} without embeddings)",
        f"  shape       {shape}",
        f"  weights     {found['bytes'] / 1e6:,.1f} MB",
        f"  KV cache    {found['kv_bytes_per_token']:,} bytes per token",
    ]
    if found["axes"]:
        lines.append(f"  can cut     {', '.join(found['axes'])}")
    lines += [f"  note        {note}" for note in found["notes"]]
    return "\n".join(lines)


def verify(checkpoint: Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Open a checkpoint with stock transformers and run it once: does it load, is it whole, will it serve well?"""

    def body() -> dict[str, Any]:
        from minitron_cli.checkpoint.hub import resolve
        from minitron_cli.checkpoint.verify import verify as verify_checkpoint

        return verify_checkpoint(resolve(checkpoint))

    def show(found: dict[str, Any]) -> str:
        lines = [f"{found['path']}: loads, whole, {found['params']:,} parameters, outputs finite"]
        return "\n".join(lines + [f"  warning: {note}" for note in found["warnings"]])

    execute(body, quiet=quiet, as_json=json, show=show)


def families(json: Json = False, quiet: Quiet = False) -> None:
    """What is supported, per axis."""

    def body() -> dict[str, Any]:
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

    def show(found: dict[str, Any]) -> str:
        width = max(len(family["name"]) for family in found["families"])
        return "\n".join(
            f"{family['name']:<{width}}  {', '.join(family['axes']) or 'inspect only'}" for family in found["families"]
        )

    execute(body, quiet=quiet, as_json=json, show=show)


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Versions, devices, memory and disk."""

    def body() -> dict[str, Any]:
        from minitron_cli.runtime.doctor import examine

        return examine()

    execute(body, quiet=quiet, as_json=json, show=lambda found: "\n".join(f"{k:<14}{v}" for k, v in found.items()))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, verify, families, doctor):
        app.command()(command)
