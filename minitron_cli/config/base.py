"""Stage configurations: frozen dataclasses whose fields are also the command line's options.

A field is declared once, with its type, bounds, default and help. Construction validates every value with pydantic
(imported only then, so that `minitron --help` stays light); unknown keys are errors that name the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, get_type_hints

from minitron_cli.errors import ConfigError


def option(default: Any, help: str, *, flag: str = "", keyed: bool = True, commas: bool = False) -> Any:
    """A field that is a `--name` option.

    `keyed=False`: the value cannot change what the stage writes. `commas=True`, for tuples: `--name a,b` is the same as
    `--name a --name b`.
    """
    metadata = {"help": help, "flag": flag, "keyed": keyed, "kind": "option", "commas": commas}
    if isinstance(default, (list, dict)):
        raise TypeError("use a tuple for a repeated option")
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, flag: str = "", keyed: bool = True) -> Any:
    """A `--name` option without a default."""
    return dataclasses.field(metadata={"help": help, "flag": flag, "keyed": keyed, "kind": "option"})


def argument(help: str, *, keyed: bool = True) -> Any:
    """A positional argument. Paths of inputs are fingerprinted, so they pass `keyed=False`."""
    return dataclasses.field(metadata={"help": help, "flag": "", "keyed": keyed, "kind": "argument"})


@cache
def _adapter(cls: type, name: str) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(cls, include_extras=True)[name])


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Base of every stage's configuration."""

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.metadata.get("commas"):
                given = split_commas(given)
            try:
                # mypy takes the instances' __hash__ for the class's own
                adapter = _adapter(type(self), field.name)  # type: ignore[arg-type]
                value = adapter.validate_python(given)
            except ValidationError as error:
                found = error.errors()
                where = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
                shown = found[0].get("input", given)
                raise ConfigError(f"{where}: {_told(found)} (got {shown!r}).") from None
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Cross-field rules; override and raise ConfigError."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from a recipe section or JSON; `where` is the prefix shown in errors.

        Raises:
            ConfigError: an unknown or missing key, or a value out of bounds.
        """
        check_keys(values, [field.name for field in dataclasses.fields(cls)], where=where)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"{where}{field.name} is required: {field.metadata['help']}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where.removesuffix('.')}: {error}" if where else str(error)) from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def key(self) -> dict[str, Any]:
        """The part of the configuration that decides what the stage writes."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.metadata.get("keyed", True)}


def _told(found: list[Any]) -> str:
    """Pydantic's message; of a choice of types what each of them asks for."""
    first, *others = dict.fromkeys(str(each["msg"]) for each in found)
    if len(found) == 1 or any(each["loc"] == found[0]["loc"] for each in found[1:]):
        return first
    more = [message.removeprefix("Input should be ") for message in others]
    return " or ".join([first.split(", unable")[0], *more])


@dataclass(frozen=True, kw_only=True)
class WritingConfig(StageConfig):
    """A stage that writes one directory."""

    out: Path = required("Directory to write; appears only when complete.", keyed=False)
    force: bool = option(False, "Replace an existing output directory.", keyed=False)


@dataclass(frozen=True, kw_only=True)
class ExportingConfig(WritingConfig):
    """A stage that writes a checkpoint."""

    push_to_hub: str | None = option(
        None, "Upload the finished checkpoint to this repository of the Hub, OWNER/NAME.", keyed=False
    )
    hub_public: bool = option(False, "Let everybody see the repository if the upload creates it.", keyed=False)

    def check(self) -> None:
        if self.hub_public and self.push_to_hub is None:
            raise ConfigError("--hub-public is about an upload; say where to with --push-to-hub OWNER/NAME.")


def command_line(name: str, config: StageConfig, *, shown: Callable[[str], str] = str) -> str:
    """A stage's command with every option that is not at its default, and DIR for the directory it writes.

    Args:
        shown: makes of a value what is printed.
    """
    arguments, options = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("out", "force", "push_to_hub", "hub_public") or value == field.default:
            continue
        if field.metadata["kind"] == "argument":
            arguments += [shown(str(item)) for item in (value if isinstance(value, tuple) else (value,))]
            continue
        flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
        if field.metadata.get("commas") and value:
            options += [flag, ",".join(shown(str(item)) for item in value)]
        elif isinstance(value, tuple):
            options += [part for item in value for part in (flag, shown(str(item)))]
        else:
            options += [flag] if value is True else [flag, shown(str(value))]
    return shlex.join(["minitron", *name.split(), *arguments, *options, "--out", "DIR"])


def split_commas(value: Any) -> Any:
    """`"a,b"` and `("a", "b,c")` as tuples of their parts; the validation judges what holds no strings."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return value
    parts: list[Any] = []
    for item in items:
        parts += [part.strip() for part in item.split(",") if part.strip()] if isinstance(item, str) else [item]
    return tuple(parts)


def check_keys(values: Mapping[str, Any], allowed: list[str], *, where: str = "") -> None:
    """Refuse keys that are not in `allowed`, naming the nearest valid one."""
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(allowed))}."
            raise ConfigError(f"Unknown key '{where}{key}'; {hint}")


def plain(value: Any) -> Any:
    """Paths to strings, tuples to lists, recursively: what JSON can hold."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value
