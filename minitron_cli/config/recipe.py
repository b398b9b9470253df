"""Recipes: the whole chain as one YAML file, every key checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from minitron_cli.config.align import AlignConfig
from minitron_cli.config.base import StageConfig, check_keys, option, required
from minitron_cli.config.bench import BenchConfig
from minitron_cli.config.correct import CorrectConfig
from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError

SECTIONS: dict[str, type[StageConfig]] = {
    "data": DataConfig,
    "correct": CorrectConfig,
    "importance": ImportanceConfig,
    "search": SearchConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "align": AlignConfig,
    "eval": EvalConfig,
    "bench": BenchConfig,
}
WIRED = {
    *("out", "force", "checkpoint", "tokenizer", "student", "teacher", "list", "importance", "plan", "search"),
    "policy",
}  # fmt: skip
"""Keys the chain fills in itself."""

TRAINING = ("correct", "distill")

ROUND = ("importance", "search", "prune", "distill")
"""Sections that a further round has of its own."""

Baseline = Literal["cross-entropy", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Recipe(StageConfig):
    """The chain: data, correct, importance, search or prune, distill, more rounds, align, baselines, eval, bench.

    A report ends it. A section that is absent is skipped; without `search` and `prune` the student is the teacher's own
    shape. Each round in `then` cuts the student of the round before it; all learn from one teacher, which is the
    corrected one if any.
    """

    name: str = required("Name shown in the report.")
    description: str = option("", "One or two sentences for the report.")
    teacher: str = required("Checkpoint to compress.")
    data: dict[str, Any] = required("Options of `data prepare`.")
    correct: dict[str, Any] | None = option(None, "Options of `correct`: the teacher is fine-tuned on the data first.")
    importance: dict[str, Any] | None = option(None, "Options of `importance`.")
    search: dict[str, Any] | None = option(None, "Options of `search`.")
    prune: dict[str, Any] | None = option(None, "Options of `prune`: explicit sizes instead of a search.")
    distill: dict[str, Any] | None = option(None, "Options of `distill`.")
    then: tuple[dict[str, Any], ...] = option((), "More rounds, each with sections importance, search, prune, distill.")
    baselines: tuple[Baseline, ...] = option((), "Honest comparisons through the same loop on the same tokens.")
    align: dict[str, Any] | None = option(
        None,
        "Options of `align`, for the last student; without `prompts`, they are the starts of the prepared data.",
    )
    eval: dict[str, Any] | None = option(None, "Options of `eval`, for every model of the run.")
    bench: dict[str, Any] | None = option(None, "Options of `bench`: the last model against the teacher.")

    def check(self) -> None:
        for number in range(len(self.rounds)):
            self._check_round(number)
        if self.baselines and self.distill is None:
            raise ConfigError("Baselines repeat the distill section with another loss; this recipe has none.")
        if self.baselines and self.then:
            raise ConfigError("Baselines compare trainings of one round; leave out `baselines` or `then`.")
        for name in ("data", "correct", "align", "eval", "bench"):
            if getattr(self, name) is not None:
                self.stage(name, _placeholders(name))

    def _check_round(self, number: int) -> None:
        where, sections = self.where(number), self.rounds[number]
        check_keys(sections, list(ROUND), where=where)
        if sections.get("search") is not None and sections.get("prune") is not None:
            raise ConfigError(f"{where}search: a round has a search section or a prune section, not both.")
        if sections.get("search") is not None and sections.get("importance") is None:
            raise ConfigError(f"{where}search: a search section needs an importance section.")
        if self.then and sections.get("distill") is None:
            raise ConfigError(f"{where}distill is required: with `then`, every round ends with a student.")
        for name in ROUND:
            if sections.get(name) is not None:
                self.stage(name, _placeholders(name), number)
        if len(str((sections.get("search") or {}).get("params") or "").split(",")) > 1:
            raise ConfigError(f"{where}search.params: a round has one size; give each size a round of its own in then.")

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        """The sections of each round."""
        return [{name: getattr(self, name) for name in ROUND}, *self.then]

    @staticmethod
    def where(number: int) -> str:
        """How messages call a round: its keys come after this."""
        return f"then.{number - 1}." if number else ""

    def stage(self, name: str, wires: Mapping[str, Any], number: int = 0) -> Any:
        """The configuration of one stage of a round, with the paths the chain fills in.

        A training section may name `data` of its own, to be tokenised on the way; its validation loss is still that of
        the prepared data.

        Raises:
            ConfigError: an unknown key or a bad value, with the section's name.
        """
        section = (self.rounds[number].get(name) if name in ROUND else getattr(self, name)) or {}
        where = f"{self.where(number)}{name}"
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: write its options as `key: value` lines.")
        wired = dict(wires)
        if name in TRAINING and section.get("data") is not None:
            prepared = wired.pop("data")
            wired |= {} if "val_data" in section else {"val_data": prepared}
        elif name in TRAINING and section.get("seq_len") is not None:
            raise ConfigError(f"{where}.seq_len goes with {where}.data: text to tokenise while training runs.")
        if name == "align" and section.get("prompts") is not None:
            wired.pop("prompts")
        optional = {"data"} if name in TRAINING else {"prompts"} if name == "align" else set()
        own = optional - wired.keys()
        filled = set(_placeholders(name)) - own
        fields = [field.name for field in dataclasses.fields(SECTIONS[name]) if field.name not in filled]
        check_keys(section, fields, where=f"{where}.")
        return SECTIONS[name].from_mapping({**section, **wired}, where=f"{where}.")


def _placeholders(name: str) -> dict[str, Any]:
    """Stand-ins for wired keys, so that a section can be checked before the chain runs."""
    fields = {field.name for field in dataclasses.fields(SECTIONS[name])} & WIRED
    values: dict[str, Any] = {field: Path("wired") for field in fields - {"force", "list", "plan", "search"}}
    values |= dict.fromkeys(fields & {"checkpoint", "tokenizer", "student", "teacher", "policy"}, "wired")
    if name == "align":  # its teacher is a choice of the method's, not the one of the chain
        values = {"policy": "wired", "out": Path("wired"), "prompts": Path("wired")}
    if name in ("importance", "search", "prune", "distill", "eval", "correct"):
        values["data"] = Path("wired")
    if name == "bench":
        values["against"] = "wired"
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
        values = _apart(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{reference} is not valid YAML{where}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{reference} should hold `key: value` lines.")
    for change in changes:
        _apply(values, change)
    return Recipe.from_mapping(values)


def _apart(value: Any) -> Any:
    """The same without parts that YAML's anchors share, so that a change of one section is not one of another."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change}: write section.key=value.")
    *path, last = key.strip().split(".")
    target: Any = values
    for part in path:
        target = _inside(target, part, change)
    if not isinstance(target, dict):
        raise ConfigError(f"--set {change}: '{last}' is no key of a section.")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {change}: '{text}' is not valid YAML.") from None


def _inside(target: Any, part: str, change: str) -> Any:
    """The section `part` of a section, made where it is absent, or of a list by its place, from 0."""
    if isinstance(target, dict):
        if target.get(part) is None:
            target[part] = {}
        if isinstance(target[part], (dict, list)):
            return target[part]
    elif part.isdecimal() and int(part) < len(target):
        return target[int(part)]
    else:
        raise ConfigError(f"--set {change}: '{part}' is none of the places 0 to {len(target) - 1} of its list.")
    raise ConfigError(f"--set {change}: '{part}' holds a value, not a section.")
