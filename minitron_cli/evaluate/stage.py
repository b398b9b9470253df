"""The `eval` stage."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.multimodal import refuse_wrapped
from minitron_cli.config.base import plain
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import InputError
from minitron_cli.evaluate.harness import Metrics, TaskSet, build_tasks, find_local, find_manager, run_tasks
from minitron_cli.evaluate.local import LocalFiles
from minitron_cli.evaluate.perplexity import Perplexity, evaluate_split
from minitron_cli.manifest import StageOutput, fingerprint, write_json
from minitron_cli.models.load import load_model
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.models.tokenizer import load_tokenizer, separator_id
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.tokens import Split, TokenDataset

RESULTS = "results.json"
STATE = "state.json"


@dataclass(frozen=True)
class EvalResult:
    """Everything measured. Losses are None without --data; `tasks` and `groups` are empty without --tasks.

    `tasks` holds metrics by task and by group, each group before its members; `groups` the members of each group;
    `notes` what is less than a whole task or group (files of some questions only).
    `loss` is nats per token; `seconds` the wall time of the run that measured.
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
    notes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = plain(self)
        return value


@dataclass
class _Inputs:
    """What was checked before any work: the checkpoint's directory, its tokenizer, the data, the task files."""

    checkpoint: Path
    tokenizer: Any
    split: Split | None
    local: LocalFiles | None

    def fingerprints(self, config: EvalConfig) -> dict[str, str]:
        paths = {"checkpoint": self.checkpoint, "data": config.data}
        found = {name: fingerprint(path) for name, path in paths.items() if path is not None}
        return found | ({"tasks": self.local.fingerprint()} if self.local is not None else {})


def run_eval(config: EvalConfig) -> EvalResult:
    """Measure a checkpoint and write OUT/results.json; continues after a kill, task by task.

    Raises:
        UserError: a path, task, device or tokenizer that does not fit; nothing was written.
        RunError: the loss is not finite.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = _check(config)
    output = StageOutput(config.out, "eval", config, inputs.fingerprints(config), force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return EvalResult(**output.result)
    began = time.monotonic()
    tasks = build_tasks(config.tasks, num_fewshot=config.num_fewshot, local=inputs.local)
    with output:
        model = load_model(inputs.checkpoint, device=device, dtype=dtype)
        measured = _measure(config, inputs, model, tasks, output.partial / STATE)
        result = EvalResult(
            out=str(config.out), checkpoint=config.checkpoint, seconds=round(time.monotonic() - began, 3), **measured
        )
        write_json(output.partial / RESULTS, measured)
        output.commit(result.to_json())
    return result


def _check(config: EvalConfig) -> _Inputs:
    """Find all that is wrong with the request without loading the model."""
    checkpoint = resolve(config.checkpoint)
    refuse_wrapped(checkpoint)
    local = None
    if config.data_dir is not None:
        local = find_local(config.tasks, config.data_dir)
    elif config.tasks:
        find_manager(config.tasks, local=False)
    tokenizer = load_tokenizer(str(checkpoint))
    if config.tasks and separator_id(tokenizer) is None:
        raise InputError(
            f"The tokenizer of {config.checkpoint} has neither bos nor eos; tasks need one to open a prompt."
        )
    split = None
    if config.data is not None:
        data = TokenDataset(config.data)
        require_same_tokenizer(data, {"the checkpoint": config.checkpoint})
        split = data.split(config.data_split)
    return _Inputs(checkpoint, tokenizer, split, local)


def _measure(config: EvalConfig, inputs: _Inputs, model: Any, tasks: TaskSet, state: Path) -> dict[str, Any]:
    """The measured fields of the result. `state` keeps what is finished: the split's numbers, then task after task."""
    done: dict[str, Any] = {"perplexity": None, "tasks": {}}
    if state.exists():
        done = json.loads(state.read_text("utf-8"))
        say(f"Continuing: {len(done['tasks'])} of {len(tasks.leaves)} tasks are done.")
    if inputs.split is not None and done["perplexity"] is None:
        done["perplexity"] = plain(_perplexity(config, inputs.split, model))
    write_json(state, done)

    def save(raw: dict[str, dict[str, Any]]) -> None:
        write_json(state, {**done, "tasks": raw})

    metrics: Metrics = {}
    groups: dict[str, list[str]] = {}
    if tasks.leaves:
        metrics, groups = run_tasks(
            tasks,
            model,
            inputs.tokenizer,
            batch_size=config.batch_size,
            limit=config.limit,
            done=done["tasks"],
            save=save,
        )
    found = done["perplexity"] or dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tokens"))
    return {"tasks": metrics, "groups": groups, "notes": tasks.notes, **found}


def _perplexity(config: EvalConfig, split: Split, model: Any) -> Perplexity:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = split.tokens.shape[1]
    if window and length > window:
        say(f"The data's sequences have {length} tokens and the model was made for {window}: expect a high perplexity.")
    sequences = min(len(split), config.max_sequences or len(split))
    with Progress("perplexity", sequences, "sequences", rate_unit="tokens") as progress:
        return evaluate_split(
            model,
            split,
            batch_size=config.batch_size,
            max_sequences=config.max_sequences,
            progress=progress,
        )
