"""The search stage: enumerate, measure zero-shot, distil with halving, choose."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.memory import save_micro_batch, saved_micro_batch
from minitron_cli.errors import ConfigError
from minitron_cli.importance.layout import Scores
from minitron_cli.importance.store import load_scores
from minitron_cli.manifest import StageOutput, fingerprint, require_disk, write_json
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.prune.plan import PrunePlan, best_layers, make_plan
from minitron_cli.prune.residual import rotates
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.group import Group, process_group
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.search.cost import Remaining
from minitron_cli.search.course import Course
from minitron_cli.search.enumerate import Candidate, spread
from minitron_cli.search.funnel import Funnel, Rung
from minitron_cli.search.joint import JointTraining
from minitron_cli.search.journal import Journal
from minitron_cli.search.listing import SearchResult, fast, feasible, run_list
from minitron_cli.search.measure import ZeroShot
from minitron_cli.search.result import Findings, write_findings
from minitron_cli.search.scores import TaskErrors, check_tasks
from minitron_cli.shape import Shape
from minitron_cli.tokens import PreparedSource, TokenDataset

TIMINGS = "timings.json"
"""Measured seconds per token: the one part of a search that another run would not repeat."""

ZERO_SHOT_BATCH = 8
"""Sequences per forward pass, whatever memory allows, so that sums are always taken in the same order."""

Chosen = dict[str | None, list[Candidate]]
"""Candidates by size."""


@dataclass(frozen=True)
class Job:
    """A checked search; nothing is loaded and nothing written. `course` is None where nothing is distilled.

    `counts` are the numbers of layers by which the layers of a model were ranked whose layers differ, so that what was
    counted is what is cut.
    """

    config: SearchConfig
    checkpoint: Checkpoint
    source: str
    found: Chosen
    dataset: TokenDataset
    device: torch.device
    inputs: dict[str, str]
    course: Course | None
    counts: frozenset[int] = frozenset()

    def spread(self, found: Mapping[str | None, list[Candidate]]) -> Chosen:
        """The candidates that are measured."""
        return {size: spread(candidates, self.config.candidates) for size, candidates in found.items()}

    def scores(self, measured: Chosen) -> tuple[Scores, str]:
        """Scores that can rank the layers of these candidates, and what ranked them.

        Raises:
            InputError: they are another checkpoint's, or say nothing about such cuts.
        """
        counts = {each.shape["layers"] for candidates in measured.values() for each in candidates}
        return _scores(self.config, self.checkpoint.shape, self.source, self.counts or counts)

    def plans(self, measured: Chosen) -> dict[str, PrunePlan]:
        """What stays of the checkpoint in each candidate, by name."""
        scores, ranked_by = self.scores(measured)
        shape, config = self.checkpoint.shape, self.config
        plans = {}
        for each in (each for candidates in measured.values() for each in candidates):
            turned = rotates(shape, scores, config.rotate, each.shape["hidden"])
            plan = plans[each.name] = make_plan(
                shape, scores, each.target, ranked_by=ranked_by, rotate=config.importance if turned else None
            )
            assert plan.params_after == each.shape.params, f"{each.name}: counted otherwise than cut"
        return plans


def run_search(config: SearchConfig) -> SearchResult:
    """Choose a shape within budgets (Minitron, section 6), or one of each size of a family.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: training diverged.
    """
    if config.list:
        return run_list(config)
    with process_group() as group:
        return _run(config, group)


def _run(config: SearchConfig, group: Group) -> SearchResult:
    began = time.monotonic()
    assert config.out is not None
    if config.mix.tasks and group.size > 1:
        raise ConfigError(f"--rank {config.rank} runs tasks, which one process does; rank by loss or kl, or use one.")
    with group.main_first():  # a finished OUT.partial is renamed by one of them
        job = _job(config)
        output = StageOutput(config.out, "search", config, job.inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return SearchResult(**output.result)
    found, seconds = job.found, dict[str, float]()
    if config.timed:
        found, seconds = group.from_main(fast(config, found, _known(output)) if group.main else ({}, {}))
    measured = job.spread(found)
    plans = job.plans(measured)
    zero_shot = _zero_shot(job, output, measured, plans, group.rank)
    course = _course(job, output, measured, group)
    tasks = TaskErrors(config)
    group.wait()  # all have looked at OUT before one of them changes it
    with output if group.main else nullcontext():
        if config.timed and group.main:
            write_json(output.partial / TIMINGS, seconds)
        if course is not None and group.main:
            save_micro_batch(output.partial, course.micro_batch, group.size)
        group.wait()
        journal = Journal(output.partial, group)
        funnel = Funnel(config.mix, journal)
        funnel.measure(plans, zero_shot)
        for candidates in measured.values():
            funnel.require_finite([each.name for each in candidates])
        rungs = _compete(job, course, funnel, measured, plans, tasks, output.partial) if course else []
        findings = Findings(config, job.checkpoint.shape, found, measured, plans, course, funnel, rungs, seconds)
        result = findings.result(time.monotonic() - began)
        if group.main:
            write_findings(findings, result, output.partial)
            output.commit(result.to_json())
        group.wait()
    return result


def _job(config: SearchConfig) -> Job:
    """Check everything that can be checked before a model is loaded."""
    assert config.importance is not None and config.data is not None
    checkpoint = Checkpoint(resolve(config.checkpoint))
    _ = checkpoint.declared
    source, ranked_for = fingerprint(checkpoint.path), set[int]()

    def ranked(counts: set[int]) -> Remaining:
        ranked_for.update(counts)
        layers = _scores(config, checkpoint.shape, source, counts)[0]["layers"]
        return lambda count: best_layers(checkpoint.shape, layers, count)

    found = feasible(config, checkpoint.shape, ranked if checkpoint.shape.layers_differ else None)
    dataset = TokenDataset(config.data)
    dataset.split("train"), dataset.split("validation")
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    check_tasks(config)
    device = pick_device(config.device)
    inputs = {"checkpoint": source, "importance": fingerprint(config.importance), "data": fingerprint(config.data)}
    if config.task_dir is not None:
        inputs["tasks"] = fingerprint(config.task_dir)
    course = None
    if config.finalists:
        entrants = [min(config.finalists, config.candidates, len(each)) for each in found.values()]
        course = Course.of(config, checkpoint, dataset, inputs["data"], device, entrants)
        if course.taught is not None:
            inputs["teacher"] = course.taught.identity
    job = Job(config, checkpoint, source, found, dataset, device, inputs, course, frozenset(ranked_for))
    job.scores(job.spread(found))
    return job


def _scores(config: SearchConfig, shape: Shape, source: str, counts: Collection[int]) -> tuple[Scores, str]:
    """Scores that can rank layers where so many are to stay, and what ranked them.

    Raises:
        InputError: they are another checkpoint's, or say nothing about such cuts.
    """
    assert config.importance is not None
    removed = {shape["layers"] - count for count in counts}
    return load_scores(config.importance, shape, source, config.layer_score, removed, config.width_score)


def _known(output: StageOutput) -> dict[str, float]:
    """Timings of an interrupted run hold, so that it goes on alike."""
    saved = output.partial / TIMINGS
    return dict(json.loads(saved.read_text("utf-8"))) if output.resuming and saved.exists() else {}


def _zero_shot(job: Job, output: StageOutput, measured: Chosen, plans: Mapping[str, PrunePlan], rank: int) -> ZeroShot:
    """How losses before training are measured.

    Raises:
        ResourceError: not even one layer of the largest candidate fits.
    """
    config = job.config
    zero_shot = ZeroShot(
        job.checkpoint, job.dataset.split("validation"), sequences=config.eval_sequences,
        batch_size=config.micro_batch or min(config.batch_size, ZERO_SHOT_BATCH), device=job.device,
        dtype=pick_dtype(config.dtype, job.device), scratch=output.partial / f"state.activations-{rank}",
    )  # fmt: skip
    largest = max((each for candidates in measured.values() for each in candidates), key=lambda c: c.shape.params)
    zero_shot.require(plans[largest.name])
    return zero_shot


def _course(job: Job, output: StageOutput, measured: Chosen, group: Group) -> Course | None:
    """The training as it fits this machine; says what the search will do.

    Raises:
        ResourceError: too little memory or disk.
    """
    counts = {size: len(candidates) for size, candidates in measured.items()}
    feasible_count = sum(map(len, job.found.values()))
    if job.course is None:
        say(f"{feasible_count} shapes meet the budgets; {sum(counts.values())} are measured zero-shot.")
        return None
    config = job.config
    course = job.course.entered([min(config.finalists, count) for count in counts.values()])
    for size, count in counts.items():
        if count < config.finalists:
            of = f" of {size}" if size else ""
            say(f"--finalists {config.finalists}: there are only {count} candidates{of}; all of them are distilled.")
    shapes = [each.shape for candidates in measured.values() for each in candidates]
    before = saved_micro_batch(output.partial, group.size) if output.resuming else None
    course = course.within_memory(shapes, before, group)
    if course.taught is not None:
        course.taught.require_room(job.device)
    largest = max(shape.params for shape in shapes)
    require_disk(output.out, 12 * largest * (sum(course.schedule.entrants) + 1), "The search state")
    say(f"{feasible_count} shapes meet the budgets.\n{course.describe(shapes)}")
    return course


def _compete(
    job: Job, course: Course, funnel: Funnel, measured: Chosen, plans: dict[str, PrunePlan], tasks: TaskErrors,
    partial: Path,
) -> list[Rung]:  # fmt: skip
    """Distil the best candidates of each size in rungs."""
    config, schedule = job.config, course.schedule
    entrants = {
        size: funnel.entrants([each.name for each in candidates], count)
        for (size, candidates), count in zip(measured.items(), schedule.entrants, strict=True)
    }
    steps = sum(count * length for count, length in zip(schedule.alive, schedule.lengths, strict=True))
    source = PreparedSource(job.dataset, config.seed, config.batch_size)
    validation = job.dataset.split("validation")
    done = sum(curve.step for curve in funnel.journal.curves.values())
    with Progress("distill candidates", steps, "steps", start=done, rate_unit="tokens") as progress:
        training = JointTraining(
            config, course, job.checkpoint, plans, source, validation, funnel.journal, partial, tasks, progress
        )
        with closing(training):
            return funnel.compete(entrants, training, schedule.ends)
