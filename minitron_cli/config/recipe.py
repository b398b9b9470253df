"""Recipes: the whole chain as one YAML file, every key checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from minitron_cli.config.base import StageConfig, check_keys, option, required
from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError

SECTIONS: dict[str, type[StageConfig]] = {
    "data": DataConfig,
    "importance": ImportanceConfig,
    "search": SearchConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "eval": EvalConfig,
}
WIRED = {"out", "force", "checkpoint", "tokenizer", "student", "teacher", "list", "importance", "plan", "search"}
"""Keys the chain fills in itself."""

Baseline = Literal["cross-entropy", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Recipe(StageConfig):
    """The chain: data, importance, search or prune, distill, baselines, eval, report.

    A section that is absent is skipped; without `search` and `prune` the student is the teacher's own shape.
    """

    name: str = required("Name shown in the report.")
    description: str = option("", "One or two sentences for the report.")
    teacher: str = required("Checkpoint to compress.")
    data: dict[str, Any] = required("Options of `data prepare`.")
    importance: dict[str, Any] | None = option(None, "Options of `importance`.")
    search: dict[str, Any] | None = option(None, "Options of `search`.")
    prune: dict[str, Any] | None = option(None, "Options of `prune`: explicit sizes instead of a search.")
    distill: dict[str, Any] | None = option(None, "Options of `distill`.")
    baselines: tuple[Baseline, ...] = option((), "Honest comparisons through the same loop on the same tokens.")
    eval: dict[str, Any] | None = option(None, "Options of `eval`, for every model of the run.")

    def check(self) -> None:
        if self.search is not None and self.prune is not None:
            raise ConfigError("A recipe has a search section or a prune section, not both.")
        if self.search is not None and self.importance is None:
            raise ConfigError("A recipe with a search section needs an importance section.")
        if self.baselines and self.distill is None:
            raise ConfigError("Baselines repeat the distill section with another loss; this recipe has none.")
        for name in SECTIONS:
            if getattr(self, name) is not None:
                self.stage(name, _placeholders(name))

    def stage(self, name: str, wires: Mapping[str, Any]) -> Any:
        """The configuration of one stage, with the paths the chain fills in.

        Raises:
            ConfigError: an unknown key or a bad value, with the section's name.
        """
        section = getattr(self, name) or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name}: write its options as `key: value` lines.")
        fields = [field.name for field in dataclasses.fields(SECTIONS[name])]
        wired = set(_placeholders(name))
        check_keys(section, [field for field in fields if field not in wired], where=f"{name}.")
        return SECTIONS[name].from_mapping({**section, **wires}, where=f"{name}.")


def _placeholders(name: str) -> dict[str, Any]:
    """Stand-ins for wired keys, so that a section can be checked before the chain runs."""
    fields = {field.name for field in dataclasses.fields(SECTIONS[name])} & WIRED
    values: dict[str, Any] = {field: Path("wired") for field in fields - {"force", "list", "plan", "search"}}
    values |= dict.fromkeys(fields & {"checkpoint", "tokenizer", "student", "teacher"}, "wired")
    if name in ("importance", "search", "distill", "eval"):
        values["data"] = Path("wired")
    return values


def shipped() -> dict[str, str]:
    """Names of the recipes that come with the package, and their text."""
    found = files("minitron_cli.recipes")
    return {
        item.name.removesuffix(".yaml"): item.read_text("utf-8")
        for item in found.iterdir()
        if item.name.endswith(".yaml")
    }


def load_recipe(reference: str, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe file or a shipped name, with `a.b=c` changes applied.

    Raises:
        ConfigError: no such recipe, not YAML, an unknown key, a bad value.
    """
    import yaml

    path = Path(reference).expanduser()
    if path.is_file():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{reference} cannot be read ({error}).") from None
    else:
        recipes = shipped()
        if reference not in recipes:
            raise ConfigError(f"{reference} is neither a file nor a shipped recipe ({', '.join(sorted(recipes))}).")
        text = recipes[reference]
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{reference} is not valid YAML{where}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{reference} should hold `key: value` lines.")
    for change in changes:
        _apply(values, change)
    return Recipe.from_mapping(values)


def _apply(values: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change}: write section.key=value.")
    *path, last = key.strip().split(".")
    target = values
    for part in path:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {change}: '{part}' holds a value, not a section.")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {change}: '{text}' is not valid YAML.") from None
