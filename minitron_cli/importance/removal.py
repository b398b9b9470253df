"""What the model loses with layers: each layer alone, each contiguous run, or the least harmful layer again and again.

Three measures over the target tokens of some calibration sequences: `loss`, the increase of the next-token loss in nats
per token (Minitron, section 2.2); `kl`, KL(whole || removed) of the next-token distributions in nats per token
(Minitron-SSM); `mse`, the squared distance of the states before the head as a share of their mean square
(Nemotron Elastic's normalised MSE, before the head as in Nemotron-H). And `task`, the drop of a task's metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import ConfigError, ShapeError
from minitron_cli.importance.layout import Array
from minitron_cli.importance.measure import Journal, Removals, Scores
from minitron_cli.importance.paths import FULL, Model, Removed, runs
from minitron_cli.importance.tasks import TaskScorer, check_task
from minitron_cli.models.streaming import StreamedModel
from minitron_cli.runtime.group import Group
from minitron_cli.tokens import Split


def require_scorable(config: ImportanceConfig, layers: int, *, streamed: bool) -> None:
    """Refuse depth scores that cannot be had, before any work.

    Raises:
        ShapeError: more layers are to be removed than can be.
        ConfigError: a task with a streamed model; an unknown task.
        InputError: a task's files, or a token that opens its prompts, are missing.
    """
    if config.remove is not None and config.remove >= layers:
        raise ShapeError(f"--remove {config.remove}: of {layers} layers at most {layers - 1} can go.")
    if config.depth_task is not None:
        if streamed:
            raise ConfigError("--depth-task needs the whole model in memory; leave it out, or do not stream.")
        check_task(config)


def score_removals(
    model: Model, split: Split, rows: list[int], config: ImportanceConfig, directory: Path, group: Group | None = None
) -> dict[str, Array]:
    """Depth scores of the kind `config.depth` asks for; higher means that more is lost.

    single: `layers.loss`, `.kl`, `.mse` and, with a task, `.task` (layers,). block: the same of `blocks`
    (layers - remove + 1,), by the first layer of the run. greedy: `greedy.order` (remove,), layers in the order they
    leave, and `greedy.loss` ... after each. `full.loss` and `full.task` (1,) are the whole model's.

    Args:
        rows: sequences of this process.
        directory: where a killed run left its state, and this one keeps its own.
        group: the processes whose sums count together.

    Raises:
        UserError: from `require_scorable`, or no token is a target.
        RunError: a loss is not a number.
    """
    require_scorable(config, len(model.layers), streamed=isinstance(model, StreamedModel))
    group = group or Group()
    journal = Journal(directory / f"state.depth-{group.rank}-of-{group.size}.safetensors")
    removals = Removals(model, split, rows, config, journal, group) if config.loss_samples else None
    tasks = TaskScorer(model, config, journal.tasks, journal.save, group) if config.depth_task else None
    if removals is None and tasks is None:
        return {}
    if config.depth == "greedy":
        scores = _greedy(removals, tasks, len(model.layers), config)
    else:
        name = "layers" if config.depth == "single" else "blocks"
        paths = runs(len(model.layers), config.remove or 1)
        scores = _named(name, _measured(removals, tasks, paths))
    if removals is not None:
        scores["full.loss"] = np.array([removals.full_loss])
    if tasks is not None:
        scores["full.task"] = np.array([tasks.whole()])
    return scores


def _measured(removals: Removals | None, tasks: TaskScorer | None, paths: Sequence[Removed]) -> Scores:
    found = removals.measure(paths) if removals is not None else {}
    return {**found, "task": tasks.drops(paths)} if tasks is not None else found


def _greedy(removals: Removals | None, tasks: TaskScorer | None, layers: int, config: ImportanceConfig) -> Scores:
    """Remove the least harmful layer, `config.remove` times; harm is always against the whole model.

    Costs remove * layers - remove * (remove - 1) / 2 evaluations. What does not decide is measured for the choice only.
    """
    removed, rounds = FULL, int(config.remove or 0)
    order: list[int] = []
    history: list[dict[str, float]] = []
    for number in range(rounds):
        left = [layer for layer in range(layers) if layer not in removed]
        paths, title = [removed | {layer} for layer in left], f"round {number + 1} of {rounds}"
        if config.depth_metric == "task":
            assert tasks is not None
            scored = {"task": tasks.drops(paths)}
            least = np.flatnonzero(scored["task"] == scored["task"].min())
            best = int(least[0])
            found = {"task": scored["task"][best]}
            if removals is not None:  # few questions leave ties, which the loss decides
                tied = removals.measure([paths[index] for index in least], trunk=removed, title=title)
                choice = int(tied["loss"].argmin())
                best = int(least[choice])
                found |= {name: values[choice] for name, values in tied.items()}
        else:
            assert removals is not None
            scored = removals.measure(paths, trunk=removed, title=title)
            best = int(scored[config.depth_metric].argmin())
            found = {name: values[best] for name, values in scored.items()}
            if tasks is not None:
                found["task"] = tasks.drops([paths[best]])[0]
        removed = paths[best]
        order.append(left[best])
        history.append(found)
    by_round = {name: np.array([found[name] for found in history]) for name in history[0]}
    return _named("greedy", {"order": np.array(order, np.float64), **by_round})


def _named(prefix: str, scores: Scores) -> Scores:
    return {f"{prefix}.{name}": values for name, values in scores.items()}
