"""One training run: steps, validation, checkpoints, logs; exact on resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron_cli.config.distill import TrainingConfig
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.fused import Lesson
from minitron_cli.distill.interrupts import Interrupted, Interrupts
from minitron_cli.distill.logs import Log, open_logs
from minitron_cli.distill.losses import TopK
from minitron_cli.distill.memory import save_micro_batch, smaller_part
from minitron_cli.distill.trainer import Batch, NotFinite, Trainer, Update
from minitron_cli.errors import ConfigError, MinitronError, RunError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.runtime.state import save_state
from minitron_cli.tokens import Sequences, Source, Split

BAD_BATCH = "not-finite.step-{}.safetensors"


class Run:
    """`step` steps are done; `losses` and `validations` are their history; all three are part of a checkpoint.

    With several processes each runs this loop on its part of every batch, and process 0 keeps the logs.

    Args:
        lesson: what the teacher says of a batch; None where the loss needs no teacher.
        micro_batch: sequences per forward pass, of each process.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Source,
        validation: Split | None,
        trainer: Trainer,
        lesson: Callable[[Batch], Lesson | TopK] | None,
        partial: Path,
        micro_batch: int,
    ) -> None:
        self.config, self.source, self.validation = config, source, validation
        self.trainer, self.lesson, self.partial, self.micro_batch = trainer, lesson, partial, micro_batch
        self.group = trainer.group
        self.checkpoints = Checkpoints(partial, config.keep, group=self.group)
        self.step = self.tokens = 0
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.logs: list[Log] = []
        self.tokens_here = 0
        self.seconds_here = 0.0

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, if there is one.

        Raises:
            ConfigError: what `--log` names refuses to start.
        """
        saved = self.checkpoints.newest()
        if saved is not None:
            tensors, values = saved
            self.trainer.restore(tensors)
            self.step, self.tokens, self.losses = values["step"], values["tokens"], values["losses"]
            self.validations = [(step, loss) for step, loss in values["validations"]]
            self.source.seek(self.step, values["source"])
            say(f"Resuming at step {self.step} of {self.trainer.steps}.")
        validated = {step for step, _ in self.validations}
        if self.group.main:
            self.logs = open_logs(self.config.log, self.partial, self.config.out, self.step, validated)

    def close(self) -> None:
        """Finish the logs and let go of the data."""
        for log in self.logs:
            log.close()
        self.source.close()

    def save(self) -> None:
        """Write a checkpoint of this step; the log that leads to it is on disk first."""
        for log in self.logs:
            log.sync()
        values = {"step": self.step, "tokens": self.tokens, "losses": self.losses, "validations": self.validations}
        self.checkpoints.save(self.step, self.trainer.tensors(), {**values, "source": self.source.state()})

    def finish(self) -> None:
        """Train to the last step, validating and saving on the way.

        Raises:
            RunError: the numbers stopped being finite.
            ConfigError: the model cannot be compiled here.
        """
        try:
            with Interrupts(self.group) as interrupts:
                self._train(interrupts)
        except Interrupted as signal:
            self.save()
            say(f"Saved at step {self.step} of {self.trainer.steps}.")
            signal.again()
            raise

    def _train(self, interrupts: Interrupts) -> None:
        config, steps, saved = self.config, self.trainer.steps, self.step
        title = "distill" if self.lesson else "train"
        with Progress(title, steps, "steps", start=self.step, rate_unit="tokens") as progress:
            while self.step < steps:
                if self.step % config.eval_every == 0:
                    self.validate()
                with interrupts.shielded():
                    if self.step % config.save_every == 0 and self.step != saved:
                        self.save()
                        saved = self.step
                    tokens = self.advance()
                progress.advance(1, rated=tokens, note=self._note())

    def _note(self) -> str:
        """The loss now, and the last validation with the step it is of."""
        seen = f"  val {self.validations[-1][1]:.3f} at {self.validations[-1][0]}" if self.validations else ""
        return f"loss {self.losses[-1]:.3f}{seen}"

    def validate(self) -> None:
        """Validation loss of the student now, once per step."""
        if self.validation is None or (self.validations and self.validations[-1][0] == self.step):
            return
        count, size = self.config.eval_sequences, self.micro_batch
        loss = evaluate_split(
            self.trainer.model, self.validation, batch_size=size, max_sequences=count, group=self.group
        )
        self.validations.append((self.step, loss.loss))
        self._log({"step": self.step, "validation": loss.loss})

    def advance(self) -> int:
        """One optimizer step; returns its tokens."""
        began = time.monotonic()
        sequences = self.source.batch(self.step)
        update = self._update(sequences)
        seconds, tokens = time.monotonic() - began, sequences.ids.size
        self.step += 1
        self.tokens += tokens
        self.tokens_here += tokens
        self.seconds_here += seconds
        self.losses.append(update.loss)
        rate = round(tokens / max(seconds, 1e-9), 1)
        self._log({"step": self.step, "tokens": self.tokens, **vars(update), "tokens_per_second": rate})
        return tokens

    def _log(self, record: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def _update(self, sequences: Sequences) -> Update:
        """Update the weights; where the first step of this process does not fit, with smaller micro-batches."""
        while True:
            try:
                return self._attempt(sequences)
            except NotFinite as error:
                raise self._not_finite(error, sequences) from error
            except torch.OutOfMemoryError:
                if self.tokens_here or self.micro_batch == 1 or self.group.size > 1:
                    raise  # one process of several cannot go back alone
            except MinitronError:
                raise
            except Exception as error:
                if self.config.compile and not self.tokens_here:
                    raise _not_compiled(error) from error
                raise
            # Out of the except block, whose traceback would hold the tensors of the attempt.
            self._take_smaller_parts()

    def _attempt(self, sequences: Sequences) -> Update:
        size, device = self.micro_batch, self.trainer.device
        sequences = sequences[self.group.part]
        parts = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        batches = [Batch.read(part, device) for part in parts]
        lessons = (self.lesson(batch) for batch in batches) if self.lesson else ()
        return self.trainer.update(batches, lessons, self.step)

    def _take_smaller_parts(self) -> None:
        self.trainer.optimizer.zero_grad(set_to_none=True)
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = smaller_part(self.config.batch_size, self.micro_batch)
        save_micro_batch(self.partial, self.micro_batch)
        say(f"The device ran out of memory; going on with {self.micro_batch} sequences per forward pass.")

    def _not_finite(self, error: NotFinite, sequences: Sequences) -> RunError:
        """Keep the batch for whoever looks for the cause."""
        path = self.partial / BAD_BATCH.format(self.step + 1)
        tensors = {"ids": torch.from_numpy(sequences.ids), "targets": torch.from_numpy(sequences.targets)}
        if self.group.main:
            save_state(path, tensors, {"step": self.step + 1, "rows": sequences.rows})
        self.group.wait()
        found = self.checkpoints.found()
        kept = f"{found[-1]} is the last checkpoint" if found else "no checkpoint was due before it"
        return RunError(
            f"{error} Its batch is in {path} and {kept}; try a lower --lr or --dtype float32, or look at the batch."
        )


def _not_compiled(error: Exception) -> ConfigError:
    cause = getattr(error, "inner_exception", error)  # of torch's BackendCompilerFailed
    told = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return ConfigError(f"--compile does not work here ({told[0].rstrip('.')}); leave it out or install a C++ compiler.")
