"""The distill stage: teacher, student, data in; a plain checkpoint out; exact on resume."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.verify import check_contents, check_structure
from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.memory import require_training_memory
from minitron_cli.distill.trainer import Batch, Teacher, Trainer
from minitron_cli.errors import InputError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.manifest import StageOutput, fingerprint, require_disk
from minitron_cli.models.load import load_model, new_model, own_memory
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.models.save import save_model
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.memory import peak_rss_bytes
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.tokens import TokenDataset, batch_rows

STATE = "state.safetensors"
CURVE = "curve.json"
LAST_STEPS = 20
"""Steps averaged for `loss_last`."""


@dataclass(frozen=True)
class DistillResult:
    """What training did; losses in nats per token; keys of `--json`."""

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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Run:
    """One training run: its progress is `step`, its history `losses` and `validations`; both are part of the state."""

    def __init__(
        self, config: DistillConfig, dataset: TokenDataset, trainer: Trainer, teacher: Teacher | None, partial: Path
    ) -> None:
        self.config, self.trainer, self.teacher, self.partial = config, trainer, teacher, partial
        self.train = dataset.split("train")
        self.validation = dataset.split("validation") if dataset.sequences("validation") else None
        self.step = 0
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.trained_here = 0
        self.seconds_here = 0.0

    def restore(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        saved = load_state(self.partial / STATE)
        if saved is None:
            return
        tensors, values = saved
        self.trainer.restore(tensors)
        self.step, self.losses = values["step"], values["losses"]
        self.validations = [(step, loss) for step, loss in values["validations"]]
        say(f"Resuming at step {self.step} of {self.trainer.steps}.")

    def save(self) -> None:
        """Replace the checkpoint."""
        values = {"step": self.step, "losses": self.losses, "validations": self.validations}
        save_state(self.partial / STATE, self.trainer.tensors(), values)

    def validate(self) -> None:
        """Validation loss of the student now, once per step."""
        if self.validation is None or (self.validations and self.validations[-1][0] == self.step):
            return
        size = self.config.micro_batch or self.config.batch_size
        count = self.config.eval_sequences
        loss = evaluate_split(self.trainer.model, self.validation, batch_size=size, max_sequences=count).loss
        self.trainer.model.train()
        self.validations.append((self.step, loss))

    def advance(self) -> int:
        """One optimizer step; returns its tokens."""
        config = self.config
        rows = batch_rows(config.seed, self.step, config.batch_size, len(self.train))
        size = config.micro_batch or config.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [Batch.read(self.train, part, self.trainer.device) for part in parts]
        lessons = [self.teacher.lesson(batch) for batch in batches] if self.teacher else []
        self.losses.append(self.trainer.update(batches, lessons, self.step))
        self.step += 1
        return sum(batch.ids.numel() for batch in batches)

    def finish(self) -> None:
        """Train to the last step, validating and saving on the way."""
        self.validate()
        config, steps = self.config, self.trainer.steps
        title = "distill" if self.teacher else "train"
        with Progress(title, steps, "steps", start=self.step, rate_unit="tokens") as progress:
            while self.step < steps:
                began = time.monotonic()
                tokens = self.advance()
                self.seconds_here += time.monotonic() - began
                self.trained_here += tokens
                if self.step % config.eval_every == 0:
                    self.validate()
                if self.step % config.save_every == 0 and self.step < steps:
                    self.save()
                shown = f"  val {self.validations[-1][1]:.3f}" if self.validations else ""
                progress.advance(1, rated=tokens, note=f"loss {self.losses[-1]:.3f}{shown}")


def run_distill(config: DistillConfig) -> DistillResult:
    """Train a student and write it as a plain checkpoint of the type it came in.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: the numbers or the disk failed midway; the last checkpoint is kept.
    """
    began = time.monotonic()
    student = Checkpoint(resolve(config.student))
    teacher = Checkpoint(resolve(config.teacher)) if config.teacher and config.objective.needs_teacher else None
    for each in (student, teacher):
        if each is not None:
            each.require_unquantised()
    dataset = TokenDataset(config.data)
    train = dataset.split("train")
    owners = {"the student": config.student, "the teacher": config.teacher if teacher else None}
    require_same_tokenizer(dataset, {name: reference for name, reference in owners.items() if reference})
    if dataset.vocab_size > student.shape["vocab"]:
        raise InputError(
            f"The data uses {dataset.vocab_size} token ids and the student knows {student.shape['vocab']}."
        )
    tokens_per_step = config.batch_size * dataset.seq_len
    steps = config.steps or max(1, round((config.tokens or 0) / tokens_per_step))
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = {"student": fingerprint(student.path), "data": fingerprint(config.data)}
    if teacher is not None:
        inputs["teacher"] = fingerprint(teacher.path)
    output = StageOutput(config.out, "distill", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return DistillResult(**output.result)
    require_training_memory(student.shape, teacher.shape if teacher else None, config, dataset.seq_len, device, dtype)
    # Two checkpoints exist while one replaces the other, and the result beside them.
    require_disk(config.out, student.shape.params * 12 * 2 + student.nbytes, "The training state")
    with output:
        model = _student_model(student, config, device)
        teaching = Teacher(load_model(teacher.path, device=device, dtype=dtype)) if teacher else None
        passes = steps * config.batch_size / len(train)
        say(f"{steps} steps of {tokens_per_step:,} tokens, {passes:.2f} passes over the train split.")
        run = Run(config, dataset, Trainer(model, config, steps, dtype), teaching, output.partial)
        run.restore()
        run.finish()
        save_model(model, student, output.partial)
        check_structure(output.partial, expected_params=student.shape.params)
        check_contents(output.partial, source=student.path)
        result = _result(run, config, steps, tokens_per_step, began)
        curve = {"loss": run.losses, "validation": run.validations, "tokens_per_step": tokens_per_step}
        (output.partial / CURVE).write_text(json.dumps(curve))
        output.commit(result.to_json())
    return result


def _student_model(student: Checkpoint, config: DistillConfig, device: torch.device) -> Any:
    """The student in fp32: its own weights, or fresh ones of its shape."""
    if config.init == "random":
        model = new_model(student.config, seed=config.seed, dtype=torch.float32)
        own_memory(model)
        return model.to(device)
    return load_model(student.path, device=device, dtype=torch.float32)


def _result(run: Run, config: DistillConfig, steps: int, tokens_per_step: int, began: float) -> DistillResult:
    run.step = steps
    run.validations = [item for item in run.validations if item[0] != steps]
    run.validate()  # of the weights as written: save_model left them rounded to the type on disk
    tail = run.losses[-LAST_STEPS:]
    return DistillResult(
        out=str(config.out),
        steps=steps,
        tokens=steps * tokens_per_step,
        loss=config.loss,
        loss_first=run.losses[0],
        loss_last=sum(tail) / len(tail),
        val_loss_before=run.validations[0][1] if run.validations else None,
        val_loss_after=run.validations[-1][1] if run.validations else None,
        tokens_per_second=round(run.trained_here / max(run.seconds_here, 1e-9), 1),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss_bytes(),
    )
