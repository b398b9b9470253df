"""The `eval` stage."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.multimodal import refuse_wrapped
from minitron_cli.config.base import plain
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import InputError
from minitron_cli.evaluate.harness import Metrics, TaskSet, build_tasks, is_error, require_tasks, run_tasks
from minitron_cli.evaluate.local import LocalFiles
from minitron_cli.evaluate.reading import Reading, open_reading
from minitron_cli.manifest import StageOutput, digest, fingerprint, write_json
from minitron_cli.models.load import load_model
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.progress import say

RESULTS, SAMPLES = "results.json", "samples"
STATE = "state.{}.json"


@dataclass(frozen=True)
class EvalResult:
    """Everything measured. Losses are None without --data and --text; `tasks` and `groups` are empty without --tasks.

    `tasks` holds metrics by task and by group, each group before its members; `groups` the members of each group;
    `notes` what is less than a whole task or group (files of some questions only). `against`: the same of the
    checkpoints compared with, and `retention`, our values over theirs.
    `loss` is nats per token; `params` the parameters of the stock class, tied ones once; `seconds` the wall time of the
    run that measured.
    """

    out: str
    checkpoint: str
    tasks: Metrics
    groups: dict[str, list[str]]
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int | None
    seconds: float
    params: int | None = None
    notes: dict[str, str] = field(default_factory=dict)
    against: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = plain(self)
        return value


@dataclass(frozen=True)
class _Model:
    """A checkpoint and its tokenizer, checked before any work."""

    name: str
    path: Path
    tokenizer: Any


@dataclass(frozen=True)
class _Inputs:
    """What was checked before any work: the checkpoints, first the one to measure; the text; the task files."""

    models: list[_Model]
    reading: Reading | None
    local: LocalFiles | None

    def fingerprints(self, config: EvalConfig) -> dict[str, str]:
        found = {"checkpoint": fingerprint(self.models[0].path)}
        found |= {f"against {number}": fingerprint(model.path) for number, model in enumerate(self.models[1:], 1)}
        found |= {"data": self.reading.fingerprint()} if self.reading is not None else {}
        return found | ({"tasks": self.local.fingerprint()} if self.local is not None else {})


def run_eval(config: EvalConfig) -> EvalResult:
    """Measure a checkpoint and those to compare with; write OUT/results.json. Continues after a kill, task by task.

    Raises:
        UserError: a path, task, device or tokenizer that does not fit; nothing was written.
        RunError: the loss is not finite.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = _check(config)
    prints = inputs.fingerprints(config)
    out = config.out if config.out is not None else _cached(config, prints)
    output = StageOutput(out, "eval", config, prints, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{out} is up to date.")
        return EvalResult(**output.result)
    began = time.monotonic()
    tasks = build_tasks(config.tasks, num_fewshot=config.num_fewshot, local=inputs.local)
    if config.out is None:
        say(f"Results are kept in {out}; the same command continues after a stop. --out DIR chooses another place.")
    with output:
        found = []
        for number, model in enumerate(inputs.models):
            if len(inputs.models) > 1:
                say(f"{model.name}:")
            measuring = _Measuring(config, model, tasks, output.partial, number)
            found.append({"checkpoint": model.name, **measuring.run(inputs.reading, device, dtype)})
        measured: dict[str, Any] = {
            **found[0],
            "groups": {name: list(group.child_names) for name, group in tasks.groups.items()},
            "notes": tasks.notes,
            "against": [other | {"retention": retention(found[0], other)} for other in found[1:]],
        }
        result = EvalResult(out=str(out), seconds=round(time.monotonic() - began, 3), **measured)
        write_json(output.partial / RESULTS, measured)
        output.commit(result.to_json())
    return result


def retention(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our values over theirs: of every metric of a task, and of the perplexity and bits per byte (there 1 or more is
    worse). None where theirs is 0.
    """
    kept: dict[str, Any] = {
        key: ours[key] / theirs[key] for key in ("perplexity", "bits_per_byte") if ours[key] is not None
    }
    kept["tasks"] = {
        name: {
            metric: value / theirs["tasks"][name][metric] if theirs["tasks"][name][metric] else None
            for metric, value in metrics.items()
            if metric != "samples" and not is_error(metric)
        }
        for name, metrics in ours["tasks"].items()
    }
    return kept


def _check(config: EvalConfig) -> _Inputs:
    """Find all that is wrong with the request without loading a model."""
    models = [_checked(name, config) for name in (config.checkpoint, *config.against)]
    tokenizers = {model.name: model.tokenizer for model in models}
    local = require_tasks(config.tasks, config.data_dir, tokenizers) if config.tasks else None
    return _Inputs(models, open_reading(config), local)


def _cached(config: EvalConfig, prints: dict[str, str]) -> Path:
    """The place of results without --out: what is measured of what decides its name."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minitron" / "eval" / digest([config.key(), prints])[:16]


def _checked(name: str, config: EvalConfig) -> _Model:
    path = resolve(name)
    refuse_wrapped(path)
    tokenizer = load_tokenizer(str(path))
    if config.chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"The tokenizer of {name} has no chat template; leave out --chat-template.")
    return _Model(name, path, tokenizer)


@dataclass(frozen=True)
class _Measuring:
    """One checkpoint's measurements; its state file keeps what is finished: the text's numbers, then each task."""

    config: EvalConfig
    model: _Model
    tasks: TaskSet
    partial: Path
    number: int

    def run(self, reading: Reading | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Metrics by task, and the numbers of the text (None without one)."""
        config, state = self.config, self.partial / STATE.format(self.number)
        done: dict[str, Any] = {"perplexity": None, "tasks": {}}
        if state.exists():
            done = json.loads(state.read_text("utf-8"))
            say(f"Continuing: {len(done['tasks'])} of {len(self.tasks.leaves)} tasks are done.")
        model = load_model(self.model.path, device=device, dtype=dtype)
        if reading is not None and done["perplexity"] is None:
            done["perplexity"] = plain(reading.measure(model, self.model.tokenizer))
        write_json(state, done)
        metrics: Metrics = {}
        if self.tasks.leaves:
            folder = self.partial / SAMPLES / (f"against-{self.number}" if self.number else "")
            metrics, _ = run_tasks(
                self.tasks, model, self.model.tokenizer, batch_size=config.batch_size, limit=config.limit,
                done=done["tasks"], save=lambda raw: write_json(state, {**done, "tasks": raw}),
                chat_template=config.chat_template, samples=folder if config.log_samples else None,
            )  # fmt: skip
        found = done["perplexity"] or dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tokens"))
        return {"tasks": metrics, **found, "params": sum(each.numel() for each in model.parameters())}
