"""A search's training, checked and planned before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.search import DEFAULT_STEPS, SearchConfig
from minitron_cli.distill.memory import SHARE, Case
from minitron_cli.distill.spread import Spread
from minitron_cli.distill.stage import require_data_fits
from minitron_cli.distill.teachers import TeacherPlan, as_taught, plan_teacher, teacher_checkpoint
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.runtime.device import pick_dtype
from minitron_cli.runtime.group import Group
from minitron_cli.runtime.memory import available_bytes, total_bytes
from minitron_cli.search.halving import Schedule
from minitron_cli.shape import Shape
from minitron_cli.tokens import PreparedSource, TokenDataset


@dataclass(frozen=True)
class Course:
    """How candidates train.

    `training`: as `distill` would be told; `taught`: by whom, None without a teacher; `micro_batch`: sequences per
    forward pass of every candidate; `free`: bytes that candidates may take together; `spread`: of every candidate, as
    the largest needs it.
    """

    training: DistillConfig
    taught: TeacherPlan | None
    schedule: Schedule
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    micro_batch: int = 0
    free: int = 0
    spread: Spread = field(default_factory=Spread)

    @classmethod
    def of(
        cls,
        config: SearchConfig,
        checkpoint: Checkpoint,
        dataset: TokenDataset,
        data: str,
        device: torch.device,
        entrants: Sequence[int],
    ) -> Course:
        """Check all that `distill` would check, without a look at memory.

        Args:
            data: the fingerprint of the data set.
            entrants: how many candidates of each size are distilled.

        Raises:
            UserError: the teacher, its cache, or the options do not fit.
        """
        per_step = config.batch_size * dataset.seq_len
        steps = config.steps or (max(1, round(config.tokens / per_step)) if config.tokens else DEFAULT_STEPS)
        schedule = Schedule.of(entrants, steps, config.rungs, per_step)
        training = _as_distill(config, steps)
        source = PreparedSource(dataset, config.seed, config.batch_size)
        teacher = teacher_checkpoint(training)
        require_data_fits("the checkpoint", checkpoint, source)
        if teacher is not None:
            require_same_tokenizer(dataset, {"the teacher": str(training.teacher)})
            require_data_fits("the teacher", teacher, source)
        dtype = pick_dtype(config.dtype, device)
        taught = plan_teacher(training, teacher, checkpoint.shape["vocab"], dataset, data, steps, dtype)
        return cls(as_taught(training, taught), taught, schedule, dataset.seq_len, device, dtype)

    @property
    def steps(self) -> int:
        """Of a candidate that passes all rungs; what the learning rate schedule spans."""
        return self.schedule.ends[-1]

    def entered(self, entrants: Sequence[int]) -> Course:
        """The same with so many candidates of each size."""
        return replace(self, schedule=replace(self.schedule, entrants=tuple(entrants)))

    def within_memory(self, students: Sequence[Shape], before: int | None, group: Group | None = None) -> Course:
        """The same with a micro-batch: what the largest candidate, training alone, has room for.

        Args:
            before: what an interrupted run of as many processes chose.

        Raises:
            ResourceError: not even one candidate fits.
        """
        group = group or Group()
        largest = max(students, key=lambda shape: shape.params)
        held = self.taught.live.shape if self.taught and self.taught.live else None
        memory = total_bytes(self.device)
        spread = Spread.of(self.training, group.size, largest, held, self.dtype, memory)
        course = replace(self, spread=spread)
        micro_batch = group.least(course.case(largest).micro_batch(before))
        free = group.least(round(SHARE * available_bytes(self.device)))
        return replace(course, micro_batch=micro_batch, free=free)

    def case(self, student: Shape) -> Case:
        """What decides memory and time of one candidate."""
        held = self.taught.live.shape if self.taught and self.taught.live else None
        return Case(student, held, self.training, self.seq_len, self.device, self.dtype, None, self.spread)

    def groups(self, students: Mapping[str, Shape]) -> list[list[str]]:
        """Candidates that train at the same time, under one teacher: as many as fit, in their order."""
        found: list[list[str]] = []
        for name in students:
            joined = [*found[-1], name] if found else []
            if joined and self._bytes([students[each] for each in joined]) <= self.free:
                found[-1] = joined
            else:
                found.append([name])
        return found

    def describe(self, students: Sequence[Shape]) -> str:
        """The plan as lines of text, supposing that the largest of the measured candidates enter."""
        largest = sorted(students, key=lambda shape: -shape.params)
        alive = self.schedule.alive
        groups = [len(self.groups(dict(zip(map(str, range(count)), largest, strict=False)))) for count in alive]
        taught = "none" if self.taught is None else "live" if self.taught.live else "cached"
        return self.schedule.describe(len(students), groups, taught)

    def _bytes(self, students: Sequence[Shape]) -> int:
        """Bytes held at the peak by several candidates; one after another passes and is saved, all others wait."""
        parts = [self.case(shape).memory(self.micro_batch) for shape in students]
        waiting = sum(part["weights"] + part["optimizer"] for part in parts)
        passing = max(sum(part.values()) - part["weights"] - part["optimizer"] - part["teacher"] for part in parts)
        copied = self.device.type == "cpu" and self.spread.processes == 1
        saving = max(12 * shape.params for shape in students) if copied else 0
        return waiting + max(passing, saving) + parts[0]["teacher"] + self._lessons()

    def _lessons(self) -> int:
        """Bytes of the teacher's states of a whole batch, kept until every candidate of the group has learned."""
        held = self.taught.live.shape if self.taught and self.taught.live else None
        tokens = self.training.batch_size * self.seq_len
        return tokens * held["hidden"] * self.dtype.itemsize if held else 0


def _as_distill(config: SearchConfig, steps: int) -> DistillConfig:
    """The options that both commands have, as `distill` takes them."""
    names = {each.name for each in fields(DistillConfig)} & {each.name for each in fields(SearchConfig)}
    shared = {name: getattr(config, name) for name in names - {"teacher", "steps", "tokens", "force"}}
    teacher = config.teacher or config.checkpoint
    return DistillConfig(student=config.checkpoint, teacher=teacher, steps=steps, **shared)
