"""Run lm-evaluation-harness tasks on a loaded model, one task at a time.

Task definitions, prompts, metrics and group averages are the harness's. Its `evaluate` is called per task, not once
for all, so that a killed run continues with the next task and finds the same numbers.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from minitron_cli.errors import ConfigError, InputError, MinitronError
from minitron_cli.evaluate.local import FOLDERS, FORMS, LocalFiles, find_files, form_of, is_mmlu
from minitron_cli.evaluate.mmlu import STANDARD_SHOTS
from minitron_cli.evaluate.quiet import FEWSHOT_SEED, quiet_harness, seed_harness
from minitron_cli.models.tokenizer import separator_id
from minitron_cli.runtime.progress import Progress, say

Metrics = dict[str, dict[str, float]]
"""task or group -> metric -> value"""


@dataclass
class TaskSet:
    """Harness objects: `leaves` are the tasks to run, `groups` average them, `roots` are the names asked for.

    `notes`: by name, what is less than the whole task or group.
    """

    leaves: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """Of the first task's first metric."""
        first = next(iter(self.leaves.values()))
        return next((bool(higher) for higher in first.higher_is_better().values()), True)


@cache
def _manager(folders: tuple[str, ...] | None) -> Any:
    """The harness's index of the tasks in some of its folders, or of all 14,000, which takes ten seconds to read."""
    import lm_eval.tasks

    if folders is None:
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[str(root / folder) for folder in folders])


def find_manager(names: Sequence[str], *, local: bool) -> Any:
    """The index that knows all `names`; `local`: only tasks that can be read from files.

    Raises:
        ConfigError: an unknown name, with near matches.
    """
    with quiet_harness():
        known = _manager(FOLDERS)
        unknown = [name for name in names if name not in known.task_index]
        unread = [name for name in names if name not in unknown and local and not _readable(known, name)]
        if not unknown and not unread:
            return known
        if local:
            wrong = [*unknown, *unread][0]
            raise ConfigError(
                f"--data-dir serves mmlu, blimp (both also in parts), {', '.join(FORMS)}, not '{wrong}'"
                f"{_near(wrong, known.all_tasks)}; run other tasks without --data-dir."
            )
        manager = _manager(None)
        for name in names:
            if name not in manager.task_index:
                raise ConfigError(
                    f"lm-evaluation-harness has no task '{name}'{_near(name, manager.all_tasks)}; "
                    "`lm-eval ls tasks` lists them."
                )
        return manager


def _readable(manager: Any, name: str) -> bool:
    return all(is_mmlu(cfg) or form_of(leaf, cfg) for leaf, cfg in leaf_configs(manager, name).items())


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


def find_local(names: Sequence[str], data_dir: Path) -> LocalFiles:
    """The files that `names` need, checked to be there; a group may miss some of its tasks.

    Raises:
        ConfigError: a task that has no local form.
        InputError: no such folder, or files are missing.
    """
    manager = find_manager(names, local=True)
    asked = {name: leaf_configs(manager, name) for name in names}
    local = find_files(data_dir, {leaf: cfg for leaves in asked.values() for leaf, cfg in leaves.items()})
    for name, leaves in asked.items():
        missing = [leaf for leaf in leaves if leaf in local.absent]
        if len(missing) == len(leaves) or (missing and not _is_group(manager, name)):
            where = "blimp/" if name.startswith("blimp") else ""
            raise InputError(
                f"{data_dir} has no file for {missing[0]}; put its questions at "
                f"{where}{missing[0].removeprefix('blimp_')}.jsonl there, or choose other --tasks."
            )
        if missing:
            local.notes[name] = f"the average of {len(leaves) - len(missing)} of its {len(leaves)} tasks"
    return local


def require_tasks(names: Sequence[str], data_dir: Path | None, tokenizers: Mapping[str, Any]) -> LocalFiles | None:
    """Find what is wrong with tasks without loading their data; the files they are read from, None for the Hub.

    Args:
        tokenizers: by how messages call their checkpoints.

    Raises:
        ConfigError: an unknown task, or one that has no local form.
        InputError: files are missing, or a tokenizer cannot open a prompt.
    """
    local = None
    if data_dir is not None:
        local = find_local(names, data_dir)
    else:
        find_manager(names, local=False)
    for name, tokenizer in tokenizers.items():
        if separator_id(tokenizer) is None:
            raise InputError(f"The tokenizer of {name} has neither bos nor eos; tasks need one to open a prompt.")
    return local


def _is_group(manager: Any, name: str) -> bool:
    cfg = manager.task_index[name].cfg
    return cfg is not None and "group" in cfg


def build_tasks(names: Sequence[str], *, num_fewshot: int | None, local: LocalFiles | None) -> TaskSet:
    """Create the tasks with their data: from files where given, else as the harness does (Hub or its cache).

    Raises:
        ConfigError: an unknown task, more shots than there are examples, a task that runs code or needs images.
        InputError: the data of a task cannot be had.
    """
    manager = find_manager(names, local=local is not None)
    tasks = TaskSet(notes=dict(local.notes) if local is not None else {})
    with quiet_harness():
        for name in names:
            loaded = _load(manager, name, local)
            tasks.leaves |= loaded["tasks"]
            tasks.groups |= loaded["groups"]
            tasks.roots += [name] if name in loaded["groups"] or name in loaded["tasks"] else list(loaded["tasks"])
        for task in tasks.leaves.values():
            _set_up(task, num_fewshot, " in --data-dir" if local is not None else "")
    for name, note in tasks.notes.items():
        say(f"{name}: {note}.")
    return tasks


def _load(manager: Any, name: str, local: LocalFiles | None) -> Any:
    """One name as the harness's tasks and groups."""
    from minitron_cli.evaluate.adapters import rows_from

    try:
        with rows_from(local) if local is not None else nullcontext():
            if local is not None and _is_group(manager, name) and name in local.notes:
                return _part_of_group(manager, name, local)
            return manager.load([name])
    except MinitronError:
        raise
    except Exception as error:  # Hub, network, missing package: every library in between has its own kinds
        reason = str(error).strip().splitlines() or [""]
        raise InputError(
            f"Task '{name}' could not get its data ({type(error).__name__}: {reason[0][:200]}); "
            "check the network, or give its files with --data-dir."
        ) from error


def _part_of_group(manager: Any, name: str, local: LocalFiles) -> dict[str, Any]:
    """A group of the tasks whose files are there; it averages those."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    present = [leaf for leaf in leaf_configs(manager, name) if leaf not in local.absent]
    loaded = manager.load(present)["tasks"]
    fields = GroupConfig.__dataclass_fields__
    group = Group.from_config(
        GroupConfig(**{key: value for key, value in manager.task_index[name].cfg.items() if key in fields})
    )
    for task in loaded.values():
        group.add(task)
    return {"tasks": loaded, "groups": {name: group}}


def _set_up(task: Any, num_fewshot: int | None, where: str) -> None:
    """Number of shots and seed, by the harness's rules; a task that says 0 itself stays at 0."""
    name, own = task.task_name, task.get_config("num_fewshot")
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"Task '{name}' runs generated code or needs images or sound; this command does neither.")
    shots = num_fewshot if num_fewshot is not None and own != 0 else own
    if shots is None:
        shots = STANDARD_SHOTS if is_mmlu({"task": name}) else 0
    if shots > (most := _most_shots(task, shots)):
        has = f"can show at most {most} solved examples" if most else "has no solved examples to show"
        raise ConfigError(f"--num-fewshot {shots}: task '{name}' {has}{where}.")
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _most_shots(task: Any, wanted: int) -> int:
    from lm_eval.api.samplers import ContextSampler

    if not hasattr(task, "sampler"):
        return wanted
    # The default sampler draws one more where it cannot rule out that the question itself is among them.
    spare = type(task.sampler) is ContextSampler and task.fewshot_cfg.split == task.config.test_split
    return max(len(task.sampler.df) - int(spare), 0)


def run_tasks(
    tasks: TaskSet,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int | Literal["auto"],
    limit: int | None = None,
    done: Mapping[str, dict[str, Any]] | None = None,
    save: Callable[[dict[str, dict[str, Any]]], None] = lambda done: None,
    title: str = "tasks",
    chat_template: bool = False,
    samples: Path | None = None,
) -> tuple[Metrics, dict[str, list[str]]]:
    """Measure all tasks, then the groups' averages.

    Args:
        limit: questions per task.
        done: raw metrics of tasks measured before; `save` is called with them after each task.
        title: of the progress line.
        chat_template: put questions into the tokenizer's template.
        samples: folder for a file per task with every question and answer.

    Returns:
        Metrics per task and group, in the order of the tree, and the members of each group.
    """
    raw = dict(done or {})
    with quiet_harness():  # the harness prepares its rows when they are first asked for
        sizes = {name: min(limit or len(task.eval_docs), len(task.eval_docs)) for name, task in tasks.leaves.items()}
    finished = sum(sizes[name] for name in raw)
    with quiet_harness(), Progress(title, sum(sizes.values()), "questions", start=finished) as progress:
        from minitron_cli.evaluate.adapters import LanguageModel

        counter = _Counter(progress)
        lm = LanguageModel(model, tokenizer, batch_size=batch_size, answered=counter.answered)
        for name, task in tasks.leaves.items():
            if name not in raw:
                counter.begin(name, sizes[name])
                raw[name], answers = _measure(lm, name, task, limit, chat_template, samples is not None)
                if samples is not None:
                    _write_samples(samples / f"{name}.jsonl", answers)
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


def _measure(
    lm: Any, name: str, task: Any, limit: int | None, chat_template: bool, logged: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's numbers of one task, as JSON holds them (keys such as `acc,none`), and its log of questions."""
    from lm_eval.evaluator import evaluate

    seed_harness()
    result = evaluate(
        lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, log_samples=logged,
        apply_chat_template=chat_template, fewshot_as_multiturn=chat_template,
    )  # fmt: skip
    task._instances = None  # prompts of a finished task are dead weight
    metrics = {
        key: value if isinstance(value, (str, int)) else float(value) for key, value in result["results"][name].items()
    }
    return metrics, result["samples"][name] if logged else []


def _write_samples(path: Path, answers: list[dict[str, Any]]) -> None:
    """One question per line: its row, the prompts, the model's answers, what each metric says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as stream:
        for answer in sorted(answers, key=lambda answer: answer["doc_id"]):
            stream.write(json.dumps(answer, ensure_ascii=False, default=str) + "\n")
    unfinished.replace(path)


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


def headline(tasks: TaskSet, metrics: Metrics) -> float:
    """The mean over the names asked for of their first metric, as the harness lists them (accuracy in most)."""
    roots = [metrics[name] for name in tasks.roots]
    firsts = [next(value for key, value in found.items() if key != "samples" and not is_error(key)) for found in roots]
    return sum(firsts) / len(firsts)


def is_error(metric: str) -> bool:
    """Whether a metric is another one's standard error."""
    return metric.partition(",")[0].endswith("_stderr")
