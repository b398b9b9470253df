"""What `report` is given: a run, the output of one stage, or a folder of such outputs made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_cli.errors import InputError
from minitron_cli.manifest import MANIFEST
from minitron_cli.report.gather import RUN, RunFiles, compared, gather, read_json, read_stages, table

STAGES = {"data": "data", "importance": "importance", "search": "search", "prune": "pruned", "distill": "student",
          "bench": "bench", "audit": "audit", "align": "aligned"}  # fmt: skip
"""Stage to the name its output has in a run. Evaluations are eval/NAME."""

TITLES = {"search": "Search", "prune": "Pruning", "distill": "Distillation", "eval": "Evaluation", "bench": "Benchmark",
          "align": "Alignment",
          "audit": "Consent audit", "importance": "Importance", "data": "Data"}  # fmt: skip


def gather_any(path: Path) -> RunFiles:
    """Read what `path` is.

    Raises:
        InputError: it holds nothing to show, or a file of it is damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; give what `minitron run`, `compress` or a stage wrote.")
    if (path / RUN).exists():
        return gather(path)
    manifest = read_json(path / MANIFEST)
    found = {path: manifest} if manifest is not None else _below(path)
    shown = {place: each for place, each in found.items() if each.get("stage") in (*STAGES, "eval")}
    if not shown:
        raise InputError(
            f"{path} has no {RUN} and no output of a stage; give what `minitron run`, `compress` or a stage wrote."
        )
    return _assembled(path, shown)


def _below(path: Path) -> dict[Path, dict[str, Any]]:
    """Outputs in a folder, and in its folder `eval`; a resumed or half-written one is not among them."""
    places = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.endswith(".partial"))
    inner = sorted(item for item in (path / "eval").iterdir() if item.is_dir()) if (path / "eval").is_dir() else []
    manifests = {place: read_json(place / MANIFEST) for place in [*places, *inner]}
    return {place: manifest for place, manifest in manifests.items() if manifest is not None}


def _assembled(path: Path, found: Mapping[Path, dict[str, Any]]) -> RunFiles:
    """Stage outputs as a run; what one of them was made from joins it where that is still there."""
    places: dict[str, Path] = {}
    for place, manifest in found.items():
        stage = str(manifest["stage"])
        name = f"eval/{place.name}" if stage == "eval" else STAGES[stage]
        places[place.name if name in places else name] = place
    for manifest in found.values():
        config = table(manifest.get("config"))
        for name in ("search", "importance"):
            if name not in places and config.get(name) and (Path(str(config[name])) / MANIFEST).is_file():
                places[name] = Path(str(config[name]))
    order = ["data", "importance", "search", "pruned", "student", "aligned"]
    places = dict(sorted(places.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    audits = {str(table(each.get("config")).get("source") or place.name): table(each.get("result"))
              for place, each in found.items() if each["stage"] == "audit"}  # fmt: skip
    stages = [str(manifest["stage"]) for manifest in found.values()]
    title = TITLES[stages[0]] if len(stages) == 1 else "Stages"
    subject = next(iter(audits), str(path)) if stages == ["audit"] else str(path)
    run: dict[str, Any] = {
        "name": f"{title} of {Path(subject).name}" if stages == ["audit"] else f"{title}: {path.name}"
    }
    run["models"] = next(
        (rows for each in found.values() if each["stage"] == "eval" and len(rows := compared(each)) > 1), []
    )
    if not run["models"] and stages == ["eval"]:
        run["models"] = compared(next(iter(found.values())))
    trained = {str(place.resolve()): table(each.get("result")).get("tokens")
               for place, each in found.items() if each["stage"] == "distill"}  # fmt: skip
    run["models"] = [{**row, "tokens": trained.get(str(Path(row["path"]).resolve()))} for row in run["models"]]
    files = read_stages(path, run, places, audits)
    return replace(files, run={**run, "teacher": _teacher(found)})


def _teacher(found: Mapping[Path, dict[str, Any]]) -> str:
    """What the chain began with, as far as the outputs tell."""
    for stage, option in (("distill", "teacher"), ("prune", "checkpoint"), ("search", "checkpoint"), ("eval", "")):
        for manifest in found.values():
            if manifest["stage"] == stage:
                rows = compared(manifest) if stage == "eval" else []
                name = rows[0]["path"] if rows else table(manifest.get("config")).get(option)
                if name:
                    return str(name)
    return ""
