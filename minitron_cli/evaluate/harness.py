"""Run lm-evaluation-harness tasks on a loaded model, one task at a time.

Task definitions, prompts, metrics and group averages are the harness's. Its `evaluate` is called per task, not once
for all, so that a killed run continues with the next task and finds the same numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from minitron_cli.errors import ConfigError, InputError, MinitronError
from minitron_cli.evaluate.mmlu import STANDARD_SHOTS, find_folder, require_subjects
from minitron_cli.evaluate.quiet import FEWSHOT_SEED, quiet_harness, seed_harness
from minitron_cli.runtime.progress import Progress, say

Metrics = dict[str, dict[str, float]]
"""task or group -> metric -> value"""


@dataclass
class TaskSet:
    """Harness objects: `leaves` are the tasks to run, `groups` average them, `roots` are the names asked for."""

    leaves: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)


@cache
def _manager(only_mmlu: bool) -> Any:
    """The harness's index of tasks; reading all 14,000 takes ten seconds, so plain MMLU has its own."""
    import lm_eval.tasks

    if not only_mmlu:
        return lm_eval.tasks.TaskManager()
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))


def find_manager(names: Sequence[str], *, local: bool) -> Any:
    """The index that knows all `names`; `local`: only tasks that can be read from files.

    Raises:
        ConfigError: an unknown name, with near matches.
    """
    with quiet_harness():
        mmlu = _manager(True)
        unknown = [name for name in names if name not in mmlu.task_index]
        if not unknown:
            return mmlu
        if local:
            raise ConfigError(
                f"--data-dir serves mmlu, its categories and its subjects, not '{unknown[0]}'"
                f"{_near(unknown[0], mmlu.all_tasks)}; run other tasks without --data-dir."
            )
        manager = _manager(False)
        for name in names:
            if name not in manager.task_index:
                raise ConfigError(
                    f"lm-evaluation-harness has no task '{name}'{_near(name, manager.all_tasks)}; "
                    "`lm-eval ls tasks` lists them."
                )
        return manager


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def leaf_configs(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    """The harness's configuration of every task below a task, tag or group, by task name."""
    entry = manager.task_index[name]
    if entry.cfg is None:
        children = sorted(entry.tags)
    elif "group" in entry.cfg:
        children = entry.cfg["task"]
    else:
        return {name: entry.cfg}
    return {leaf: cfg for child in children for leaf, cfg in leaf_configs(manager, child).items()}


def local_folder(names: Sequence[str], data_dir: Path) -> Path:
    """The folder of task files that `names` need, checked to be whole.

    Raises:
        ConfigError: a task that has no local form.
        InputError: no such folder, or files are missing.
    """
    manager = find_manager(names, local=True)
    folder = find_folder(data_dir)
    subjects = {cfg["dataset_name"]: None for name in names for cfg in leaf_configs(manager, name).values()}
    require_subjects(folder, subjects)
    return folder


def build_tasks(names: Sequence[str], *, num_fewshot: int | None, folder: Path | None) -> TaskSet:
    """Create the tasks with their data: from `folder` where given, else as the harness does (Hub or its cache).

    Raises:
        ConfigError: an unknown task, more shots than there are examples, a task that runs code or needs images.
        InputError: the data of a task cannot be had.
    """
    manager = find_manager(names, local=folder is not None)
    tasks = TaskSet()
    with quiet_harness():
        for name in names:
            loaded = _load(manager, name, folder)
            tasks.leaves |= loaded["tasks"]
            tasks.groups |= loaded["groups"]
            tasks.roots += [name] if name in loaded["groups"] or name in loaded["tasks"] else list(loaded["tasks"])
        for task in tasks.leaves.values():
            _set_up(task, num_fewshot)
    return tasks


def _load(manager: Any, name: str, folder: Path | None) -> Any:
    """One name as the harness's tasks and groups."""
    from minitron_cli.evaluate.adapters import rows_from

    try:
        with rows_from(folder) if folder is not None else nullcontext():
            return manager.load([name])
    except MinitronError:
        raise
    except Exception as error:  # Hub, network, missing package: every library in between has its own kinds
        reason = str(error).strip().splitlines() or [""]
        raise InputError(
            f"Task '{name}' could not get its data ({type(error).__name__}: {reason[0][:200]}); "
            "check the network, or for mmlu give the files with --data-dir."
        ) from error


def _set_up(task: Any, num_fewshot: int | None) -> None:
    """Number of shots and seed, by the harness's rules; a task that says 0 itself stays at 0."""
    name, own = task.task_name, task.get_config("num_fewshot")
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"Task '{name}' runs generated code or needs images or sound; this command does neither.")
    shots = num_fewshot if num_fewshot is not None and own != 0 else own
    if shots is None:
        shots = STANDARD_SHOTS if name in _manager(True).task_index else 0
    available = len(task.sampler.df) if hasattr(task, "sampler") else shots
    if shots > available:
        raise ConfigError(f"--num-fewshot {shots}: task '{name}' has only {available} solved examples.")
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)


def run_tasks(
    tasks: TaskSet,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    limit: int | None = None,
    done: Mapping[str, dict[str, Any]] | None = None,
    save: Callable[[dict[str, dict[str, Any]]], None] = lambda done: None,
    title: str = "tasks",
) -> tuple[Metrics, dict[str, list[str]]]:
    """Measure all tasks, then the groups' averages.

    Args:
        limit: questions per task.
        done: raw metrics of tasks measured before; `save` is called with them after each task.
        title: of the progress line.

    Returns:
        Metrics per task and group, in the order of the tree, and the members of each group.
    """
    raw = dict(done or {})
    sizes = {name: min(limit or len(task.eval_docs), len(task.eval_docs)) for name, task in tasks.leaves.items()}
    finished = sum(sizes[name] for name in raw)
    with quiet_harness(), Progress(title, sum(sizes.values()), "questions", start=finished) as progress:
        from minitron_cli.evaluate.adapters import LanguageModel

        counter = _Counter(progress)
        lm = LanguageModel(model, tokenizer, batch_size=batch_size, answered=counter.answered)
        for name, task in tasks.leaves.items():
            if name not in raw:
                counter.begin(name, sizes[name])
                raw[name] = _measure(lm, name, task, limit)
                counter.answered(1, 1)
                save(raw)
    if lm.truncated:
        say(f"{lm.truncated} prompts are longer than the model's context ({lm.max_length}) and lost their beginning.")
    raw |= {name: group.aggregate(raw) for name, group in tasks.groups.items()}
    groups = {name: list(group.child_names) for name, group in tasks.groups.items()}
    return {name: plain_metrics(raw[name]) for name in _tree(tasks.roots, groups)}, groups


class _Counter:
    """Turns the answers of the task at hand into questions of the whole run."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.name, self.size, self.shown = progress, "", 0, 0

    def begin(self, name: str, size: int) -> None:
        self.name, self.size, self.shown = name, size, 0

    def answered(self, done: int, total: int) -> None:
        reached = self.size * done // total
        self.progress.advance(max(reached - self.shown, 0), note=self.name)
        self.shown = max(reached, self.shown)


def _measure(lm: Any, name: str, task: Any, limit: int | None) -> dict[str, Any]:
    """The harness's numbers of one task, as JSON holds them; keys such as `acc,none`."""
    from lm_eval.evaluator import evaluate

    seed_harness()
    result = evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, log_samples=False)
    task._instances = None  # prompts of a finished task are dead weight
    return {
        key: value if isinstance(value, (str, int)) else float(value) for key, value in result["results"][name].items()
    }


def _tree(roots: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Names with each group before its members, once each."""
    names: dict[str, None] = {}
    for root in roots:
        for name in [root, *_tree(groups.get(root, ()), groups)]:
            names.setdefault(name)
    return list(names)


def plain_metrics(raw: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` becomes `acc`; another filter stays in the name; `samples` is how many questions counted."""
    plain: dict[str, float] = {}
    for key, value in raw.items():
        if key == "sample_len":
            plain["samples"] = value
        elif "," in key and isinstance(value, (int, float)):  # a standard error of one question is "N/A"
            plain[key.removesuffix(",none")] = float(value)
    return plain
