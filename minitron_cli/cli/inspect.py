"""`minitron inspect`, `verify`, `doctor`: look, never write."""

from __future__ import annotations

from typing import Any

import typer

from minitron_cli.cli import families
from minitron_cli.cli.run import execute
from minitron_cli.cli.words import Json, Quiet, Ref
from minitron_cli.runtime.table import Table


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
        *_active(found),
        f"  shape       {shape}",
        f"  weights     {found['bytes'] / 1e6:,.1f} MB",
        f"  KV cache    {found['kv_bytes_per_token']:,} bytes per token",
    ]
    if found["state_bytes_per_sequence"]:
        lines.append(f"  state       {found['state_bytes_per_sequence']:,} bytes per sequence, of any length")
    if found["axes"]:
        lines.append(f"  can cut     {', '.join(found['axes'])}")
    lines += [f"  note        {note}" for note in found["notes"]]
    return "\n".join(lines)


def _active(found: dict[str, Any]) -> list[str]:
    """What a token meets of a mixture of experts; nothing of a dense model."""
    if not found["experts_per_token"]:
        return []
    chosen, experts = found["experts_per_token"], found["shape"]["experts"]
    return [f"  active      {found['params_active']:,}  ({chosen} of {experts} experts per token)"]


def verify(checkpoint: Ref, json: Json = False, quiet: Quiet = False) -> None:
    """Does it load in stock transformers, is it whole and finite, will it serve well?"""

    def body() -> dict[str, Any]:
        from minitron_cli.checkpoint.hub import resolve
        from minitron_cli.checkpoint.verify import verify as verify_checkpoint

        return verify_checkpoint(resolve(checkpoint))

    def show(found: dict[str, Any]) -> str:
        ran = "outputs finite" if found["ran"] else "too large to run here"
        lines = [f"{found['path']}: loads, whole, {found['params']:,} parameters, values finite, {ran}"]
        return "\n".join(lines + [f"  warning: {note}" for note in found["warnings"]])

    execute(body, quiet=quiet, as_json=json, show=show)


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Versions, devices, memory and disk."""

    def body() -> dict[str, Any]:
        from minitron_cli.runtime.doctor import examine

        return examine()

    execute(body, quiet=quiet, as_json=json, show=_show_doctor)


def _show_doctor(found: dict[str, Any]) -> list[str | Table]:
    rows = [(name.replace("_", " "), str(value)) for name, value in found.items() if name != "advice"]
    return [Table(("", ""), rows, left=2), *(f"advice: {text}" for text in found["advice"])]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(inspect)
    app.command()(verify)
    families.register(app)
    app.command()(doctor)
