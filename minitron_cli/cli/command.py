"""Make a Typer command from a stage's configuration class: its fields are the options, declared once."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from minitron_cli.cli.run import execute
from minitron_cli.config.base import StageConfig
from minitron_cli.runtime.launch import require_one_process
from minitron_cli.runtime.table import Shown

Show = Callable[[dict[str, Any]], Shown]


def add_stage(
    app: typer.Typer,
    name: str,
    config: type[StageConfig],
    run: Callable[[Any], Any],
    show: Show,
    *,
    dry_run: tuple[Callable[[Any], dict[str, Any]], Show] | None = None,
    together: bool = False,
) -> None:
    """Register `minitron NAME` for a stage.

    Args:
        run: takes the validated configuration and returns a result with `to_json()`; imports heavy modules itself.
        show: the result's JSON as text for people.
        dry_run: for stages with a plan: makes it as JSON, and shows it.
        together: several processes of a torchrun may run it.
    """

    def command(**values: Any) -> None:
        quiet, as_json = values.pop("quiet"), values.pop("json")
        dry = values.pop("dry_run", False)

        def body() -> dict[str, Any]:
            if not together:
                require_one_process(name)
            settings = config.from_mapping({key: value for key, value in values.items() if value is not None})
            if dry and dry_run is not None:
                return dry_run[0](settings)
            result: dict[str, Any] = run(settings).to_json()
            return result

        execute(body, quiet=quiet, as_json=as_json, show=dry_run[1] if dry and dry_run is not None else show)

    parameters = [_parameter(config, field) for field in dataclasses.fields(config)]
    parameters += [_flag("quiet", "No progress, no messages."), _flag("json", "Print one JSON object on stdout.")]
    if dry_run is not None:
        parameters.append(_flag("dry_run", "Print the plan and stop; nothing is written."))
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = config.__doc__
    app.command(name)(command)


def _flag(name: str, help: str) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    option = typer.Option(f"--{name.replace('_', '-')}", help=help)
    return inspect.Parameter(name, kind, default=False, annotation=Annotated[bool, option])


def _parameter(config: type[StageConfig], field: dataclasses.Field[Any]) -> inspect.Parameter:
    """One field as a Typer parameter; bounds stay with the configuration, which checks them for recipes too."""
    # Where commas separate, the configuration splits the text, for recipes too.
    hint = list[str] if field.metadata.get("commas") else _plain_type(get_type_hints(config)[field.name])
    required = field.default is dataclasses.MISSING
    if field.metadata["kind"] == "argument":
        marker: Any = typer.Argument(help=field.metadata["help"], show_default=False)
    else:
        flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
        marker = typer.Option(flag, help=field.metadata["help"])
    default = inspect.Parameter.empty if required else field.default
    if isinstance(default, tuple):
        default = list(default)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, marker]
    )


def _plain_type(hint: Any) -> Any:
    """The type Typer should parse: no bounds, tuples as lists, literals as they are."""
    if get_origin(hint) is Annotated:
        return _plain_type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        inner = [_plain_type(part) for part in get_args(hint) if part is not type(None)]
        return inner[0] | None if len(inner) == 1 else str | None
    if get_origin(hint) is tuple:
        return list[_plain_type(get_args(hint)[0])]  # type: ignore[misc]
    if get_origin(hint) is Literal or hint in (str, int, float, bool, Path):
        return hint
    raise TypeError(f"no option type for {hint}")
