"""Everything the page shows, read from the files of a run; nothing is computed on models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.drawing.format import number
from minitron_cli.errors import InputError
from minitron_cli.importance.layout import SCORES
from minitron_cli.manifest import MANIFEST

RUN = "run.json"
TRAINED = {"student": "distilled", "cross-entropy": "cross-entropy", "scratch": "from scratch"}
LABELS = {"teacher": "teacher", "pruned": "pruned", **TRAINED, "aligned": "aligned"}
STAGES = ("data", "importance", "search", "pruned", *TRAINED, "aligned")
BENCH = "bench"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """One row of the comparison; None where nothing was measured."""

    name: str
    label: str
    path: str = ""
    params: float | None = None
    non_embedding: float | None = None
    tokens: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """What is less than a whole task."""


@dataclass(frozen=True)
class Curve:
    """One training run. `kind` is the training loss: "kl" or "ce"; `validation` holds (tokens, nats per token)."""

    name: str
    label: str
    kind: str
    loss: Array
    tokens_per_step: float
    validation: list[tuple[float, float]]


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read. Absent stages are None or empty."""

    path: Path
    run: dict[str, Any]
    recipe: dict[str, Any]
    manifests: dict[str, dict[str, Any]]
    models: list[Model]
    curves: list[Curve]
    plan: dict[str, Any] | None
    search: dict[str, Any] | None
    scores: dict[str, Array]
    groups: dict[str, list[str]]
    consent: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Corpus to the summary of its consent audit."""
    aligned: dict[str, Any] = field(default_factory=dict)
    """`curve.json` of an alignment, with its `samples` before and after."""

    def model(self, name: str) -> Model | None:
        """One model of the comparison."""
        return next((model for model in self.models if model.name == name), None)

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage's manifest says it found."""
        return table(self.manifests.get(stage, {}).get("result"))

    def config(self, stage: str) -> dict[str, Any]:
        """The options a stage ran with."""
        return table(self.manifests.get(stage, {}).get("config"))


def table(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def removed_layers(files: RunFiles) -> list[int]:
    """Numbers of the layers the plan drops."""
    plan = files.plan or {}
    total = number(table(plan.get("sizes_before")).get("layers"))
    kept = plan.get("layers")
    if total is None or not isinstance(kept, list):
        return []
    return [layer for layer in range(int(total)) if layer not in kept]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        InputError: the file is there and cannot be used.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged; run its stage again with --force, or remove it to leave it out.")
    return value


def gather(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        InputError: a file of it is damaged.
    """
    run = read_json(path / RUN) or {}
    consent = read_json(path / "audit" / "summary.json")
    places = {name: path / name for name in _stage_names(path)}
    return read_stages(path, run, places, {"audit": consent} if consent is not None else {})


def read_stages(path: Path, run: dict[str, Any], places: dict[str, Path], consent: dict[str, Any]) -> RunFiles:
    """A run from the directories of its stages, by name; `consent` is used where the data carries no audit.

    Raises:
        InputError: a file is damaged.
    """
    found = {name: read_json(place / MANIFEST) for name, place in places.items()}
    manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
    plans = (read_json(places[name] / "plan.json") for name in ("pruned", "search") if name in places)
    audits = table(table(manifests.get("data", {}).get("result")).get("consent"))
    return RunFiles(
        path=path,
        run=run,
        recipe=read_json(path / "recipe.json") or {},
        manifests=manifests,
        models=_models(run, manifests),
        curves=[
            curve
            for name, place in places.items()
            if name in TRAINED and (curve := _curve(place, name, manifests)) is not None
        ],
        plan=next((plan for plan in plans if plan is not None), None),
        search=read_json(places["search"] / "search.json") if "search" in places else None,
        scores=_scores(places["importance"] / SCORES) if "importance" in places else {},
        groups=_groups(manifests),
        consent={name: table(summary) for name, summary in audits.items()} or consent,
        aligned=_aligned(places["aligned"]) if "aligned" in manifests else {},
    )


def _stage_names(path: Path) -> list[str]:
    """The chain's directories, in its order; other models' evaluations after the known ones."""
    folders = sorted(item.name for item in (path / "eval").iterdir()) if (path / "eval").is_dir() else []
    order = list(LABELS)
    folders.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [*STAGES, *(f"eval/{name}" for name in folders), BENCH]


def _models(run: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> list[Model]:
    """The rows of run.json, or of an unfinished run what its stages tell."""
    rows = [row for row in records(run.get("models")) if isinstance(row.get("name"), str)]
    return [_model(row, manifests) for row in rows or _unfinished(run, manifests)]


def compared(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of one evaluation of several checkpoints: first what was compared with, last what was asked about."""
    result = table(manifest.get("result"))
    entries = [*records(result.get("against")), result]
    rows: list[dict[str, Any]] = []
    for entry in entries:
        base = Path(str(entry.get("checkpoint") or "model")).name
        role = base if base in LABELS else "student" if entry is result else "pruned" if rows else "teacher"
        taken = [row["name"] for row in rows]
        shown = base.removeprefix("builtin:")
        rows.append(
            {
                **entry,
                "name": shown if role in taken else role,
                "label": shown,
                "tokens": None,  # an evaluation's are those it predicted
                "path": str(entry.get("checkpoint") or ""),
            }
        )
    return rows


def _model(row: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> Model:
    name = row["name"]
    label = _label(name, str(row.get("label") or name), manifests)
    keys = ("params", "tokens", "loss", "perplexity", "bits_per_byte")
    numbers = {key: number(row.get(key)) for key in keys}
    tasks = {task: table(metrics) for task, metrics in table(row.get("tasks")).items()}
    non_embedding = number(row.get("params_non_embedding"))
    noted = table(manifests.get(f"eval/{name}", {}).get("result"))
    notes = {task: str(note) for task, note in table(row.get("notes") or noted.get("notes")).items()}
    path = str(row.get("path") or "")
    return Model(name, label, path, non_embedding=non_embedding, tasks=tasks, notes=notes, **numbers)


def _label(name: str, label: str, manifests: dict[str, dict[str, Any]]) -> str:
    """A student that was not distilled is not called so."""
    config = table(manifests.get(name, {}).get("config"))
    if name != "student" or config.get("loss", "kl") == "kl":
        return label
    return "from scratch" if config.get("init") == "random" else "retrained"


def _unfinished(run: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    pruned = table(manifests.get("pruned", {}).get("result"))
    rows = []
    for name, label in LABELS.items():
        measured = table(manifests.get(f"eval/{name}", {}).get("result"))
        own = table(manifests.get(name, {}).get("result"))
        if not measured and not own and name != "teacher":
            continue
        if not measured and name == "teacher" and not (run.get("teacher") or pruned):
            continue
        params = pruned.get("params_before" if name == "teacher" else "params_after")
        path = run.get("teacher") if name == "teacher" else own.get("out")
        rows.append(
            {**measured, "name": name, "label": label, "path": path, "params": params, "tokens": own.get("tokens")}
        )
        if name in ("teacher", "pruned"):
            rows[-1]["tokens"] = None
    return rows


def _curve(place: Path, name: str, manifests: dict[str, dict[str, Any]]) -> Curve | None:
    saved = read_json(place / "curve.json")
    if saved is None:
        return None
    try:
        loss = np.asarray(saved["loss"], np.float64).reshape(-1)
        per_step = float(saved["tokens_per_step"])
        pairs = [(float(step) * per_step, number(value)) for step, value in saved.get("validation") or []]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{place / 'curve.json'} is not a training curve; run its stage again.") from None
    kind = table(manifests.get(name, {}).get("config")).get("loss") or ("kl" if name == "student" else "ce")
    validation = [(tokens, value) for tokens, value in pairs if value is not None]
    return Curve(name, _label(name, TRAINED[name], manifests), str(kind), loss, per_step, validation)


def _aligned(place: Path) -> dict[str, Any]:
    """What `align` measured on the way, and responses before and after."""
    try:
        lines = (place / "samples.jsonl").read_text("utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
    except FileNotFoundError:
        samples = []
    except (OSError, ValueError):
        raise InputError(f"{place / 'samples.jsonl'} is damaged; remove it to leave it out.") from None
    return {**(read_json(place / "curve.json") or {}), "samples": samples}


def _scores(path: Path) -> dict[str, Array]:
    """Scores by axis; axes with values that are not numbers are left out."""
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise InputError(f"{path} is damaged; run `minitron importance` again with --force.") from None
    arrays = {name: np.asarray(values, np.float64) for name, values in stored.items()}
    return {name: values for name, values in arrays.items() if values.size and bool(np.isfinite(values).all())}


def _groups(manifests: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Members of each group of tasks, from any evaluation that has some."""
    groups: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        if name.startswith("eval/"):
            found = table(table(manifest.get("result")).get("groups"))
            lists = {group: members for group, members in found.items() if isinstance(members, list)}
            groups |= {group: [str(member) for member in members] for group, members in lists.items()}
    return groups
