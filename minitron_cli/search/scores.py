"""What candidates are compared by: validation loss, validation KL to the teacher, errors of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.config.objective import parse_objective
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.terms import loss_values
from minitron_cli.distill.trainer import Batch, Teacher
from minitron_cli.evaluate.harness import TaskSet, build_tasks, find_local, headline, require_tasks, run_tasks
from minitron_cli.evaluate.perplexity import CHUNK_ELEMENTS
from minitron_cli.models.chunks import parts
from minitron_cli.models.head import Head, backbone_output
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.tokens import Split
from minitron_cli.tokens.stream import read_rows

KL = parse_objective("kl")


@torch.no_grad()
def validation_kl(
    models: Mapping[str, Any], teacher: Teacher, split: Split, *, sequences: int, batch_size: int, device: torch.device
) -> dict[str, float]:
    """KL(teacher, student) in nats per target token of the first sequences; each passes the teacher once for all."""
    sums, tokens = dict.fromkeys(models, 0.0), 0
    sequences = min(sequences, len(split))
    for start in range(0, sequences, batch_size):
        batch = Batch.read(read_rows(split, range(start, min(start + batch_size, sequences))), device)
        lesson = teacher.lesson(batch)
        tokens += len(lesson.hidden)
        for name, model in models.items():
            output = backbone_output(model, batch.ids)
            hidden, head = batch.at_targets(output.last_hidden_state), Head(model, output)
            for chunk in parts(len(hidden), max(1, CHUNK_ELEMENTS // head.vocab)):
                found = loss_values(KL, head(hidden[chunk]), lesson.head(lesson.hidden[chunk]), None)
                sums[name] += float(found.double().sum())
    return {name: total / max(tokens, 1) for name, total in sums.items()}


def check_tasks(config: SearchConfig) -> None:
    """Find what is wrong with the tasks of --rank without loading their data.

    Raises:
        ConfigError: an unknown task, or one that has no local form.
        InputError: files are missing, or the tokenizer cannot open a prompt.
    """
    if config.mix.tasks:
        tokenizer = load_tokenizer(str(resolve(config.checkpoint)))
        require_tasks(config.mix.tasks, config.task_dir, {config.checkpoint: tokenizer})


class TaskErrors:
    """Errors of the tasks of --rank: 1 - the first metric, as the harness lists them, or the metric itself where lower
    is better.
    """

    def __init__(self, config: SearchConfig) -> None:
        """Load the tasks' data.

        Raises:
            ConfigError, InputError: it cannot be had.
        """
        self.config, names = config, config.mix.tasks
        folder = find_local(names, config.task_dir) if names and config.task_dir is not None else None
        self.tasks = {name: build_tasks([name], num_fewshot=None, local=folder) for name in names}
        self.tokenizer = load_tokenizer(str(resolve(config.checkpoint))) if names else None

    def of(self, model: Any, title: str, batch_size: int) -> dict[str, float]:
        """Every task's error by name."""
        training = model.training  # the harness's model class changes it
        found = {name: self._error(tasks, model, f"{title} {name}", batch_size) for name, tasks in self.tasks.items()}
        model.train(training)
        return found

    def _error(self, tasks: TaskSet, model: Any, title: str, batch_size: int) -> float:
        limit = self.config.task_limit
        metrics, _ = run_tasks(tasks, model, self.tokenizer, batch_size=batch_size, limit=limit, title=title)
        value = headline(tasks, metrics)
        return 1 - value if tasks.higher_is_better else value
