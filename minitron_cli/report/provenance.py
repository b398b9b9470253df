"""Where the numbers come from: stages, versions, keys, the recipe and the command that repeats the run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.card import HUB_ID, front_matter
from minitron_cli.config.align import AlignConfig
from minitron_cli.config.audit import AuditConfig
from minitron_cli.config.base import StageConfig, command_line
from minitron_cli.config.bench import BenchConfig
from minitron_cli.config.correct import CorrectConfig
from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.drawing.format import NONE, moment, number
from minitron_cli.errors import ConfigError
from minitron_cli.report.gather import RunFiles, records, table
from minitron_cli.runtime.progress import duration

COMMANDS: dict[str, tuple[str, type[StageConfig] | None]] = {
    "data": ("data prepare", DataConfig), "audit": ("data audit", AuditConfig), "correct": ("correct", CorrectConfig),
    "importance": ("importance", ImportanceConfig), "search": ("search", SearchConfig),
    "prune": ("prune", PruneConfig), "distill": ("distill", DistillConfig), "align": ("align", AlignConfig),
    "eval": ("eval", EvalConfig), "bench": ("bench", BenchConfig),
}  # fmt: skip
LICENCE = re.compile(r"(licen[cs]e|copying).*", re.IGNORECASE)
UNKNOWN = "not stated in its files"


def provenance(files: RunFiles) -> dict[str, Any]:
    """Stages, versions, keys, the recipe and the command that repeats the run."""
    statuses = {row.get("name"): row.get("status") for row in records(files.run.get("stages"))}
    names = dict.fromkeys([*(name for name in statuses if isinstance(name, str)), *files.manifests])
    stages = [_stage(name, files.manifests.get(name, {}), statuses.get(name)) for name in names]
    versions: dict[str, dict[str, None]] = {}
    for manifest in files.manifests.values():
        for library, version in {"minitron": manifest.get("minitron"), **table(manifest.get("versions"))}.items():
            versions.setdefault(library, {})[str(version)] = None
    total = sum(number(manifest.get("seconds")) or 0.0 for manifest in files.manifests.values())
    again = shlex.join(["minitron", "run", str(files.path / "recipe.json"), "--out", f"{files.path}-again"])
    return {
        "stages": stages,
        "total": duration(total) if total else "",
        "versions": [(name, ", ".join(found)) for name, found in versions.items()],
        "commands": [line for name, found in files.manifests.items() if (line := stage_command(found))],
        "licences": licences(files),
        "recipe": recipe_text(files.recipe) if files.recipe else "",
        "command": again if files.recipe else "",
    }


def _stage(name: str, manifest: Mapping[str, Any], status: Any) -> dict[str, Any]:
    seconds = number(manifest.get("seconds"))
    return {
        "name": name,
        "status": str(status or ("done" if manifest else NONE)),
        "took": NONE if seconds is None else _took(seconds),
        "started": moment(manifest.get("started")),
        "key": str(manifest.get("key") or ""),
        "inputs": [(str(key), str(value)) for key, value in table(manifest.get("inputs")).items()],
    }


def stage_command(manifest: Mapping[str, Any]) -> str:
    """The command that a stage's output stands for; empty where this version does not know its options."""
    name, kind = COMMANDS.get(str(manifest.get("stage")), ("", None))
    config = table(manifest.get("config"))
    if kind is None or not config.get("out"):
        return ""
    try:
        line = command_line(name, kind.from_mapping(config))
    except ConfigError:
        return ""
    return line.removesuffix("DIR") + shlex.quote(str(config["out"]))


def licences(files: RunFiles) -> list[tuple[str, str, str]]:
    """What the model and each text may be used under, as far as their files say: (what, name, licence)."""
    base = next((table(table(found.get("history")).get("base")) for found in files.manifests.values()
                 if found.get("history")), {})  # fmt: skip
    rows = [("model", str(base["name"]), str(base.get("licence") or UNKNOWN))] if base.get("name") else []
    sources = files.config("data").get("sources")
    for source in sources if isinstance(sources, list) else []:
        name = str(source).rpartition("@")[0] or str(source)
        rows.append(("text", name, _text_licence(name)))
    return rows


def _text_licence(name: str) -> str:
    """From the front matter of a README beside the text, or the first line of a licence file there."""
    if name == "python-stdlib":
        return "Python Software Foundation License"
    path = Path(name).expanduser()
    if not path.exists():
        return "see its page on the Hub" if HUB_ID.fullmatch(name) else UNKNOWN
    folder = path if path.is_dir() else path.parent
    stated = front_matter(folder).get("license")
    if isinstance(stated, str):
        return stated
    for item in sorted(folder.iterdir()):
        if item.is_file() and LICENCE.fullmatch(item.name):
            lines = item.read_text("utf-8", errors="replace").splitlines()
            return f"{next((line.strip() for line in lines if line.strip()), '')[:80]} ({item.name})"
    return UNKNOWN


def _took(seconds: float) -> str:
    """Tenths of a second where they matter."""
    if seconds < 0.1:
        return "<0.1s"
    return f"{seconds:.1f}s" if seconds < 10 else duration(seconds)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as the YAML one would write, without the sections and options that are empty."""
    import yaml

    plain = json.loads(json.dumps(recipe))
    shown = {key: value for key, value in plain.items() if value not in (None, [], "")}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
