"""Candidates in training under one teacher: each batch passes it once for all that are in memory together."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.cache_reader import CachedTeacher
from minitron_cli.distill.checkpoints import Checkpoints, remove
from minitron_cli.distill.interrupts import Interrupted, Interrupts
from minitron_cli.distill.trainer import Batch, Teacher, Trainer
from minitron_cli.errors import RunError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.runtime.memory import give_back_freed
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.search.contender import Contender, Point
from minitron_cli.search.course import Course
from minitron_cli.search.journal import Journal
from minitron_cli.search.measure import cut_in_memory
from minitron_cli.search.scores import TaskErrors, validation_kl
from minitron_cli.shape import Shape
from minitron_cli.tokens import PreparedSource, Split


class JointTraining:
    """Brings candidates from one rung to the next; a step is a step of `distill`, whoever trains beside.

    `progress` counts optimizer steps of all candidates. Use `close` at the end.
    """

    def __init__(
        self,
        config: SearchConfig,
        course: Course,
        checkpoint: Checkpoint,
        plans: dict[str, PrunePlan],
        source: PreparedSource,
        validation: Split,
        journal: Journal,
        directory: Path,
        tasks: TaskErrors,
        progress: Progress,
    ) -> None:
        """`directory` keeps the candidates' checkpoints."""
        self.config, self.course, self.checkpoint, self.plans = config, course, checkpoint, plans
        self.source, self.validation, self.journal, self.directory = source, validation, journal, directory
        self.tasks, self.progress, self.group = tasks, progress, journal.group
        self.numbers = {name: number for number, name in enumerate(plans)}
        self.present: dict[str, Contender] = {}
        self.teacher: Teacher | CachedTeacher | None = None

    def close(self) -> None:
        """Let go of the teacher."""
        if self.teacher is not None:
            self.teacher.close()

    def train(self, names: Sequence[str], end: int) -> None:
        """Bring candidates to the end of a rung, as many at a time as fit into memory, and measure them there."""
        curves = self.journal.curves
        waiting = [name for name in names if name not in curves or not curves[name].reached(end)]
        shapes = {name: Shape.of(planned_config(self.checkpoint.shape, self.plans[name])) for name in waiting}
        groups = self.course.groups(shapes)
        for group in groups:
            if len(groups) > 1:
                self._make_room(group)
            for name in group:
                self.join(name)
            self._train([self.present[name] for name in group], end)
            curves |= {name: self.present[name].curve for name in group}
            self.journal.save()

    def _make_room(self, group: Sequence[str]) -> None:
        """Let go of all others; they are saved at the end of every rung."""
        for name in [name for name in self.present if name not in group]:
            del self.present[name]
        gc.collect()
        give_back_freed()

    def dismiss(self, names: Sequence[str]) -> None:
        """Let go of candidates that have left, in memory and on disk; their curves are in the journal."""
        for name in names:
            self.present.pop(name, None)
            self.group.wait()
            if self.group.main:
                for path in self._checkpoints(name).found():
                    remove(path)
            self.group.wait()

    def join(self, name: str) -> None:
        """Have a candidate in memory where it stands: as saved, else freshly cut."""
        if name not in self.present:
            course, plan = self.course, self.plans[name]
            model = cut_in_memory(self.checkpoint, plan, course.device, torch.float32)
            sharding = course.spread.student_sharding(self.group, course.device, course.dtype)
            if sharding is not None:
                shape = Shape.of(planned_config(self.checkpoint.shape, plan))
                model = sharding.split(model, shape, trained=True)
            trainer = Trainer(model, course.training, course.steps, course.dtype, None, self.group)
            self.present[name] = Contender(name, trainer, self._checkpoints(name))

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self.directory, 1, f"candidate-{self.numbers[name]:04d}", self.group)

    def _train(self, group: Sequence[Contender], end: int) -> None:
        try:
            with Interrupts(self.group) as interrupts:
                self._steps(group, end, interrupts)
        except Interrupted as signal:
            for each in group:
                each.save()
            say(f"Saved the candidates in training at step {min(each.curve.step for each in group)}.")
            signal.again()
            raise

    def _steps(self, group: Sequence[Contender], end: int, interrupts: Interrupts) -> None:
        """Step by step; after a kill some may be ahead of others, which catch up first."""
        while behind := [each for each in group if not each.curve.reached(end)]:
            step = min(each.curve.step for each in behind)
            now = [each for each in behind if each.curve.step == step]
            self._look(now, step)
            now = [each for each in now if not each.curve.reached(end)]
            with interrupts.shielded():
                if step and step % self.config.save_every == 0:
                    for each in now:
                        each.save()
                if now:
                    self.step(now, step)

    def step(self, contenders: Sequence[Contender], step: int) -> None:
        """One optimizer step of some candidates on the same batch."""
        whole, size = self.source.batch(step), self.course.micro_batch
        sequences = whole[self.group.part]
        parts = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        batches = [Batch.read(part, self.course.device) for part in parts]
        teacher = self._opened()
        lessons: Any = (teacher.lesson(batch) for batch in batches) if teacher else ()
        if len(contenders) > 1:  # a single one takes them one by one, and holds one
            lessons = list(lessons)
        for each in contenders:
            each.learn(batches, lessons)
            note = f"step {step + 1}  {each.name} loss {each.curve.losses[-1]:.3f}" if each.curve.losses else ""
            self.progress.advance(rated=whole.ids.size, note=note)

    def _opened(self) -> Teacher | CachedTeacher | None:
        """The teacher, loaded when it is first needed."""
        if self.teacher is None and self.course.taught is not None:
            course = self.course
            sharding = course.spread.teacher_sharding(self.group, course.device, course.dtype)
            self.teacher = self.course.taught.open(course.device, self.group, sharding)
        return self.teacher

    def _look(self, contenders: Sequence[Contender], step: int) -> None:
        """Measure what is due at a step, once; at a rung's end all that decides, and save."""
        decides = step in self.course.schedule.ends
        new = [each for each in contenders if each.curve.at(step) is None]
        if not new or not (decides or (step and step % self.config.eval_every == 0)):
            return
        points = {each.name: point for each in new if (point := self._losses(each, step, decides)) is not None}
        if decides and self.config.mix.needs_kl:
            for name, value in self._kl([each for each in new if each.name in points]).items():
                points[name]["kl"] = value
        for each in new:
            each.curve.points += [points[each.name]] if each.name in points else []
            if decides:
                each.save()

    def _losses(self, contender: Contender, step: int, decides: bool) -> Point | None:
        """Validation loss, and where it decides the tasks' errors; None where the loss is not finite."""
        size, count = self.course.micro_batch, self.config.eval_sequences
        try:
            found = evaluate_split(
                contender.model, self.validation, batch_size=size, max_sequences=count, group=self.group
            )
        except RunError as error:
            contender.fail(str(error))
            return None
        point: Point = {"step": step, "loss": found.loss}
        return point | (self.tasks.of(contender.model, contender.name, size) if decides else {})

    def _kl(self, contenders: Sequence[Contender]) -> dict[str, float]:
        teacher = self._opened()
        assert isinstance(teacher, Teacher), "the configuration insists on a live one"
        return validation_kl(
            {each.name: each.model for each in contenders}, teacher, self.validation,
            sequences=self.config.eval_sequences, batch_size=self.course.micro_batch, device=self.course.device,
        )  # fmt: skip
