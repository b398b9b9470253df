"""The distill stage: teacher, student, data in; a plain checkpoint out; exact on resume."""

from __future__ import annotations

import json
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron_cli.checkpoint.card import CheckpointOutput
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.verify import check_contents, check_structure
from minitron_cli.config.distill import DistillConfig, TrainingConfig
from minitron_cli.data.consent.record import audit_of
from minitron_cli.distill.corpus import Corpus, note_data, open_corpus, require_same_data
from minitron_cli.distill.intermediate import Matching
from minitron_cli.distill.logs import require_log
from minitron_cli.distill.loop import BAD_BATCH, Run
from minitron_cli.distill.memory import Case, save_micro_batch, saved_micro_batch
from minitron_cli.distill.plan import TrainingPlan, describe, make_plan
from minitron_cli.distill.spread import Spread
from minitron_cli.distill.teachers import TeacherPlan, as_taught, plan_teacher, teacher_checkpoint
from minitron_cli.distill.trainer import Teacher, Trainer
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.manifest import fingerprint, read_manifest, require_disk
from minitron_cli.models.load import context_length, load_model, new_model, own_memory
from minitron_cli.models.save import save_model
from minitron_cli.models.shard import Sharding
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.group import Group, process_group
from minitron_cli.runtime.launch import processes
from minitron_cli.runtime.memory import peak_rss_bytes, total_bytes
from minitron_cli.runtime.progress import say
from minitron_cli.tokens import Source

CURVE = "curve.json"
LAST_STEPS = 20
"""Steps averaged for `loss_last`."""


@dataclass(frozen=True)
class DistillResult:
    """What training did; losses in nats per token; keys of `--json`.

    `consent`: what `data audit` found about each source of the data; None where nothing was audited.
    """

    out: str
    steps: int
    tokens: int
    loss: str
    loss_first: float
    loss_last: float
    val_loss_before: float | None
    val_loss_after: float | None
    tokens_per_second: float
    seconds: float
    peak_rss_bytes: int
    consent: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A checked run; nothing is loaded and nothing written."""

    config: DistillConfig
    student: Checkpoint
    teacher: TeacherPlan | None
    corpus: Corpus
    inputs: dict[str, str]
    case: Case
    steps: int

    @property
    def states(self) -> Matching | None:
        """Intermediate states to compare."""
        return self.case.states

    def plan(self, micro_batch: int) -> TrainingPlan:
        """What it will do, hold and take."""
        return make_plan(self.case, self.steps, self.corpus.source.length, micro_batch)


def plan_distill(config: DistillConfig) -> TrainingPlan:
    """What `distill --dry-run` prints.

    Raises:
        UserError: the input is wrong.
    """
    return plan_training(config, "student")


def run_distill(config: DistillConfig) -> DistillResult:
    """Train a student and write it as a plain checkpoint of the type it came in.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: the numbers or the disk failed midway; the last checkpoint is kept.
    """
    return train(config, "student", "distill", config)


def plan_training(config: DistillConfig, trained: str) -> TrainingPlan:
    """What `train` would do."""
    job = _job(config, trained)
    return job.plan(job.case.micro_batch())


def train(config: DistillConfig, trained: str, stage: str, given: TrainingConfig) -> DistillResult:
    """Every training stage of the chain.

    Args:
        trained: how messages and the manifest call the checkpoint that is trained.
        stage: the stage's name in the manifest.
        given: its configuration as the user gave it.
    """
    with process_group() as group:
        return _train(config, trained, stage, given, group)


def _train(config: DistillConfig, trained: str, stage: str, given: TrainingConfig, group: Group) -> DistillResult:
    began = time.monotonic()
    with group.main_first():  # a finished OUT.partial is renamed by one of them
        job = _job(config, trained)
        output = CheckpointOutput(config.out, stage, given, job.inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return DistillResult(**output.result)
    student, device, source, spread = job.student, job.case.device, job.corpus.source, job.case.spread
    require_same_data(output, job.inputs, config.data)
    before = saved_micro_batch(output.partial, spread.processes) if output.resuming else None
    micro_batch = group.least(job.case.micro_batch(before))
    # One checkpoint more than are kept exists while it replaces the oldest, and the result beside them.
    require_disk(config.out, student.shape.params * 12 * (config.keep + 1) + student.nbytes, "The training state")
    if job.teacher is not None:
        job.teacher.require_room(device)
    if group.main:
        say(describe(job.plan(micro_batch)))
        if group.size > 1:
            say(spread.describe())
    if job.states is not None:
        say(job.states.describe())
    group.wait()  # all have looked at OUT before one of them changes it
    with output if group.main else nullcontext():
        if group.main:
            note_data(output, job.inputs, config.data)
            save_micro_batch(output.partial, micro_batch, spread.processes)
        validation = job.corpus.validation(config.eval_sequences)
        held = spread.teacher_sharding(group, device, job.case.dtype)
        teacher = job.teacher.open(device, group, held) if job.teacher else None
        model = _student_model(student, config, device, spread.student_sharding(group, device, job.case.dtype))
        config = as_taught(config, job.teacher)
        if job.states is not None:
            assert isinstance(teacher, Teacher)
            teacher.listener = job.states.teacher_listener(teacher.model)
        state_loss = job.states.loss(model) if job.states else None
        trainer = Trainer(model, config, job.steps, job.case.dtype, state_loss, group)
        lesson = teacher.lesson if teacher else None
        run = Run(config, source, validation, trainer, lesson, output.partial, micro_batch)
        with closing(run), closing(teacher) if teacher else nullcontext():
            run.restore()
            run.finish()
            save_model(model, student, output.partial, group)
            if group.main:
                check_structure(output.partial, expected_params=student.shape.params)
                check_contents(output.partial, source=student.path)
            result = _result(run, config, began)
        if group.main:
            _commit(output, run, result, config.batch_size * source.seq_len)
        group.wait()
    return result


def _commit(output: CheckpointOutput, run: Run, result: DistillResult, tokens_per_step: int) -> None:
    """Add the curve to the checkpoint, and let OUT appear."""
    curve = {"loss": run.losses, "validation": run.validations, "tokens_per_step": tokens_per_step}
    (output.partial / CURVE).write_text(json.dumps(curve))
    for solved in output.partial.glob(BAD_BATCH.format("*")):
        solved.unlink()
    output.commit(result.to_json())


def _job(config: DistillConfig, trained: str) -> Job:
    """Check everything that can be checked before a model is loaded."""
    require_log(config.log)
    student = Checkpoint(resolve(config.student))
    teacher = teacher_checkpoint(config)
    models = {f"the {trained}": student, **({"the teacher": teacher} if teacher else {})}
    references = {f"the {trained}": config.student, **({"the teacher": str(config.teacher)} if teacher else {})}
    for each in models.values():
        each.require_unquantised()
    corpus = open_corpus(config, references)
    source = corpus.source
    for name, each in models.items():
        require_data_fits(name, each, source)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = {trained: fingerprint(student.path), **corpus.inputs}
    steps = steps_of(config, source.seq_len)
    taught = plan_teacher(config, teacher, student.shape["vocab"], corpus.dataset, inputs["data"], steps, dtype)
    if taught is not None:
        inputs["teacher"] = taught.identity
    held = taught.live.shape if taught and taught.live else None
    states = Matching.of(config, held, student.shape) if config.states and held else None
    if config.compile and processes() > 1:
        raise ConfigError("--compile needs one process; leave it out under torchrun.")
    spread = Spread.of(config, processes(), student.shape, held, dtype, total_bytes(device))
    case = Case(student.shape, held, config, source.seq_len, device, dtype, states, spread)
    return Job(config, student, taught, corpus, inputs, case, steps)


def steps_of(config: TrainingConfig, seq_len: int) -> int:
    """Optimizer steps, as asked for or as tokens need."""
    return config.steps or max(1, round((config.tokens or 0) / (config.batch_size * seq_len)))


def require_data_fits(name: str, checkpoint: Checkpoint, source: Source) -> None:
    """Insist that a model knows every token of the data and reaches over a sequence.

    Raises:
        InputError: it does not.
    """
    words = checkpoint.shape["vocab"]
    if source.vocab_size > words:
        raise InputError(f"{source.name} uses {source.vocab_size} token ids and {name} knows {words}.")
    context = context_length(dict(checkpoint.config))
    if context is not None and source.seq_len > context:
        raise InputError(
            f"Sequences of {source.name} have {source.seq_len} tokens and {name} has a context of {context}; "
            f"use a --seq-len of at most {context}."
        )


def _student_model(student: Checkpoint, config: DistillConfig, device: torch.device, sharding: Sharding | None) -> Any:
    """The student in fp32: its own weights, or fresh ones of its shape."""
    if config.init == "random":
        model = new_model(dict(student.config), seed=config.seed, dtype=torch.float32)
        own_memory(model)
        return sharding.split(model, student.shape, trained=True) if sharding else model.to(device)
    if sharding is not None:
        return sharding.load(student, trained=True)
    return load_model(student.path, device=device, dtype=torch.float32)


def _result(run: Run, config: DistillConfig, began: float) -> DistillResult:
    run.validate()  # of the weights as written: save_model left them rounded to the type on disk
    tail = run.losses[-LAST_STEPS:]
    return DistillResult(
        out=str(config.out),
        steps=run.step,
        tokens=run.tokens,
        loss=config.loss,
        loss_first=run.losses[0],
        loss_last=sum(tail) / len(tail),
        val_loss_before=run.validations[0][1] if run.validations else None,
        val_loss_after=run.validations[-1][1] if run.validations else None,
        tokens_per_second=round(run.tokens_here / max(run.seconds_here, 1e-9), 1),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss_bytes(),
        consent=_consent(config),
    )


def _consent(config: DistillConfig) -> dict[str, Any] | None:
    """The consent audit of the data's sources: as `data prepare` recorded it, or of the streamed text itself."""
    if config.seq_len is not None:
        audit = audit_of(str(config.data))
        return {str(config.data): audit} if audit is not None else None
    found = ((read_manifest(config.data) or {}).get("result") or {}).get("consent")
    return dict(found) if found else None
