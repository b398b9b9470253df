"""What a recipe will hold and take, from the teacher's config.json alone.

Counted are the stages that pass tokens through models: correction, scores, search, distillation and baselines. Data
preparation, cutting, alignment, evaluation and the report are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import read_config
from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.plan import PlanConfig
from minitron_cli.config.recipe import Recipe, load_recipe
from minitron_cli.config.search import DEFAULT_STEPS, SearchConfig
from minitron_cli.distill.memory import Case
from minitron_cli.distill.plan import product_speed, step_flops
from minitron_cli.distill.spread import Spread
from minitron_cli.distill.stage import steps_of
from minitron_cli.errors import ConfigError
from minitron_cli.forecast.devices import Device, device_of
from minitron_cli.prune.sizes import complete_target
from minitron_cli.runtime.device import pick_dtype
from minitron_cli.search.enumerate import Candidate, spread
from minitron_cli.search.halving import Schedule
from minitron_cli.search.listing import feasible
from minitron_cli.shape import Shape

WIRE = Path("wired")


@dataclass(frozen=True)
class Part:
    """One stage. `flops` of all devices together; `memory` in bytes of one device at its peak, of trainings;
    `micro_batch`: sequences that pass each device at once, None where not even one fits.
    """

    name: str
    params: int
    teacher_params: int | None
    steps: int
    tokens: int
    devices: int
    flops: float
    flops_per_step: float
    tokens_per_second: float
    hours: float
    memory: dict[str, int]
    micro_batch: int | None
    student_parts: int
    teacher_parts: int
    checkpointed: bool


@dataclass(frozen=True)
class Forecast:
    """The whole recipe; keys of `--json`. `speed`: operations per second that each device is taken to reach."""

    recipe: str
    teacher: str
    devices: int
    device: str
    device_memory: int
    peak: float | None
    mfu: float | None
    speed: float
    stages: list[dict[str, Any]]
    hours: float
    device_hours: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_plan(config: PlanConfig) -> Forecast:
    """Estimate a recipe.

    Raises:
        UserError: the recipe is wrong, or its sizes cannot be had.
    """
    recipe, device = load_recipe(config.recipe, config.set), device_of(config)
    teacher = Shape.of(read_config(resolve(recipe.teacher, config_only=True)))
    plan = _Plan(recipe, teacher, device, config.devices, config.mfu)
    parts = list(plan.parts())
    hours = sum(part.hours for part in parts)
    return Forecast(
        recipe=recipe.name,
        teacher=recipe.teacher,
        devices=config.devices,
        device=device.name,
        device_memory=device.memory,
        peak=device.peak,
        mfu=config.mfu if device.peak is not None else None,
        speed=plan.speed,
        stages=[asdict(part) for part in parts],
        hours=hours,
        device_hours=sum(part.hours * config.devices for part in parts),
    )


class _Plan:
    """The stages of one recipe on so many devices."""

    def __init__(self, recipe: Recipe, teacher: Shape, device: Device, devices: int, mfu: float) -> None:
        self.recipe, self.teacher, self.device, self.devices = recipe, teacher, device, devices
        self.place = torch.device(device.kind)
        self.seq_len = int(recipe.stage("data", {"out": WIRE, "tokenizer": "wired"}).seq_len)
        if device.peak is not None:
            self.speed = mfu * device.peak
        else:  # at the sizes of the teacher's products
            config = DistillConfig(student="s", loss="ce", data=WIRE, out=WIRE, steps=1, device=device.kind)
            case = Case(teacher, None, config, self.seq_len, self.place, pick_dtype("auto", self.place))
            self.speed = product_speed(case, max(1, 2048 // self.seq_len))

    def parts(self) -> Iterator[Part]:
        """In the order of the chain."""
        shape = self.teacher
        if self.recipe.correct is not None:
            given = self.recipe.stage("correct", {"out": WIRE, "teacher": "wired", "data": WIRE})
            yield self._training("correct", given.training(), shape, None)
        for number, sections in enumerate(self.recipe.rounds):
            where = "" if len(self.recipe.rounds) == 1 else f"round {number + 1}: "
            if sections.get("importance") is not None:
                yield self._importance(where, number, shape)
            uncut = shape
            if sections.get("search") is not None:
                found = self._candidates(number, uncut)
                yield self._search(where, number, uncut, found)
                shape = found[0].shape
            elif sections.get("prune") is not None:
                shape = self._cut(number, uncut)
            if sections.get("distill") is not None:
                wires = {"student": "wired", "teacher": self.recipe.teacher, "out": WIRE, "data": WIRE}
                config = self.recipe.stage("distill", wires, number)
                yield self._training(f"{where}distill", config, shape, self.teacher)
                for name in self.recipe.baselines:
                    plain = dataclasses.replace(config, loss="ce", states=(), alpha=None)
                    yield self._training(name, plain, shape, None)

    def _case(self, config: DistillConfig, student: Shape, teacher: Shape | None) -> Case:
        dtype = pick_dtype(config.dtype, self.place)
        held = teacher if config.needs_teacher else None
        over = Spread.of(config, self.devices, student, held, dtype, self.device.memory)
        return Case(student, held, config, config.seq_len or self.seq_len, self.place, dtype, None, over)

    def _training(self, name: str, config: DistillConfig, student: Shape, teacher: Shape | None) -> Part:
        case = self._case(config, student, teacher)
        fewer = case.fitting(self.device.memory)
        steps, step = steps_of(config, case.seq_len), float(step_flops(case))
        tokens = steps * config.batch_size * case.seq_len
        seconds = steps * step / (self.devices * self.speed)
        return Part(
            name=name,
            params=student.params,
            teacher_params=case.teacher.params if case.teacher else None,
            steps=steps,
            tokens=tokens,
            devices=self.devices,
            flops=steps * step,
            flops_per_step=step,
            tokens_per_second=tokens / seconds,
            hours=seconds / 3600,
            memory=case.memory(fewer or 1),
            micro_batch=fewer,
            student_parts=case.spread.student,
            teacher_parts=case.spread.teacher,
            checkpointed=config.checkpoint_activations,
        )

    def _passes(self, name: str, shape: Shape, tokens: float, flops: float, devices: int) -> Part:
        """A stage that is bound by how fast tokens pass."""
        seconds = flops / (devices * self.speed)
        return Part(
            name, shape.params, None, 0, round(tokens), devices, flops, 0.0, tokens / max(seconds, 1e-9),
            seconds / 3600, {}, None, 1, 1, False,
        )  # fmt: skip

    def _importance(self, where: str, number: int, shape: Shape) -> Part:
        wires = {"checkpoint": "wired", "data": WIRE, "out": WIRE}
        config = self.recipe.stage("importance", wires, number)
        # Removing a layer starts from the states before it: half of the layers, on average, for each of them.
        passes = config.samples + config.loss_samples * (1 + shape["layers"] / 2)
        tokens = passes * self.seq_len
        return self._passes(f"{where}importance", shape, tokens, tokens * _forward(shape, self.seq_len), self.devices)

    def _search_config(self, number: int) -> SearchConfig:
        wires = {"checkpoint": self.recipe.teacher, "importance": WIRE, "data": WIRE, "out": WIRE}
        config: SearchConfig = self.recipe.stage("search", wires, number)
        return config

    def _candidates(self, number: int, shape: Shape) -> list[Candidate]:
        config = self._search_config(number)
        (found,) = feasible(config, shape).values()
        return spread(found, config.candidates)

    def _search(self, where: str, number: int, uncut: Shape, found: list[Candidate]) -> Part:
        """Zero-shot losses of all candidates, then the rungs, taking every candidate for the largest."""
        config, largest = self._search_config(number), found[0].shape
        per_step = config.batch_size * self.seq_len
        each = _forward(largest, self.seq_len)
        zero_shot = len(found) * config.eval_sequences * self.seq_len
        steps = config.steps or (max(1, round(config.tokens / per_step)) if config.tokens else DEFAULT_STEPS)
        schedule = Schedule.of([min(config.finalists, len(found))], steps, config.rungs, per_step)
        trained = schedule.student_tokens if config.finalists else 0
        taught = schedule.teacher_tokens([1] * len(schedule.ends)) if config.finalists else 0
        flops = (zero_shot + 3 * trained) * each + taught * _forward(uncut, self.seq_len)
        return self._passes(f"{where}search", largest, zero_shot + trained, flops, self.devices)

    def _cut(self, number: int, shape: Shape) -> Shape:
        config = self.recipe.stage("prune", {"checkpoint": "wired", "out": WIRE, "data": WIRE}, number)
        target = config.target()
        if config.drop_layers:
            target["layers"] = shape["layers"] - len(config.drop_layers)
        if not target:
            raise ConfigError("The prune section names no sizes, so there is nothing to plan with; give some.")
        sizes = complete_target(shape, target)
        own = {axis: sizes[axis] for axis in shape.sizes}
        return Shape.of(new_config(shape.config, shape.family, own, list(range(own["layers"]))))


def _forward(shape: Shape, seq_len: int) -> int:
    """Operations of a forward pass per token, which sees half the sequence on average."""
    return shape.flops_per_token(seq_len // 2)
