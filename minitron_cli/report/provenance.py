"""Where the numbers come from: stages, versions, keys, the recipe and the command that repeats the run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from minitron_cli.drawing.format import NONE, moment, number
from minitron_cli.report.gather import RunFiles, records, table
from minitron_cli.runtime.progress import duration


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
