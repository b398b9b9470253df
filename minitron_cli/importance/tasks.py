"""What a task of the evaluator loses with layers: loss and tasks disagree about depth (Llama-3.1-Minitron)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.evaluate.harness import TaskSet, build_tasks, find_local, headline, require_tasks, run_tasks
from minitron_cli.importance.layout import Array
from minitron_cli.importance.paths import FULL, Removed
from minitron_cli.models.layerwise import LayerwiseModel
from minitron_cli.models.taps import place_taps, skipped_layer
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.runtime.group import Group


def check_task(config: ImportanceConfig) -> None:
    """Find what is wrong with the task without loading its data.

    Raises:
        ConfigError: an unknown task, or one that has no local form.
        InputError: files are missing, or the tokenizer cannot open a prompt.
    """
    assert config.depth_task is not None
    tokenizer = load_tokenizer(str(resolve(config.checkpoint)))
    require_tasks([config.depth_task], config.depth_task_dir, {config.checkpoint: tokenizer})


class TaskScorer:
    """The first metric of a task, as the harness lists them (accuracy in most), with layers skipped."""

    def __init__(
        self,
        model: LayerwiseModel,
        config: ImportanceConfig,
        done: dict[str, float],
        save: Callable[[], None],
        group: Group,
    ) -> None:
        """`done` holds scores by path; `save` is called when one was added."""
        assert config.depth_task is not None
        self.model, self.config, self.done, self.save, self.group = model.model, config, done, save, group
        names, folder = [config.depth_task], config.depth_task_dir
        files = find_local(names, folder) if folder is not None else None
        self.tasks: TaskSet = build_tasks(names, num_fewshot=None, local=files)
        self.tokenizer = load_tokenizer(str(resolve(config.checkpoint)))
        self.blocks = list(place_taps(self.model, model.shape, ("block",)))

    def whole(self) -> float:
        """The whole model's metric."""
        return float(self._scores([FULL])[0])

    def drops(self, paths: Sequence[Removed]) -> Array:
        """By how much each path is worse than the whole model, (paths,)."""
        whole, *found = self._scores([FULL, *paths]).tolist()
        sign = 1.0 if self.tasks.higher_is_better else -1.0
        drops: Array = sign * (whole - torch.tensor(found, dtype=torch.float64).numpy())
        return drops

    def _scores(self, paths: Sequence[Removed]) -> torch.Tensor:
        """The metric of each path, (paths,); processes share the work."""
        scores = torch.zeros(len(paths), dtype=torch.float64)
        for index in self.group.share(list(range(len(paths)))):
            path = paths[index]
            key = ",".join(map(str, sorted(path)))
            if key not in self.done:
                self.done[key] = self._score(path, f"task {index + 1} of {len(paths)}")
                self.save()
            scores[index] = self.done[key]
        return self.group.total(scores)

    def _score(self, path: Removed, title: str) -> float:
        with ExitStack() as stack:
            for block in self.blocks:
                if block.layer in path:
                    stack.enter_context(skipped_layer(block))
            limit, size = self.config.depth_task_limit, self.config.batch_size
            metrics, _ = run_tasks(self.tasks, self.model, self.tokenizer, batch_size=size, limit=limit, title=title)
        return headline(self.tasks, metrics)
