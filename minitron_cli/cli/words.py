"""Arguments and options that commands without a stage of their own share."""

from __future__ import annotations

from typing import Annotated

import typer

Ref = Annotated[str, typer.Argument(help="Checkpoint: directory, Hub id or builtin:tiny-py.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no messages.")]
