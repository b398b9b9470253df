"""One alignment run: steps, measurements, rails, checkpoints, logs; exact on resume."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.align.lessons import Lesson, Teaching
from minitron_cli.align.measure import Measurement, Yardstick
from minitron_cli.align.policy import Update
from minitron_cli.align.prompts import Prompt
from minitron_cli.align.rewards import RewardFailed
from minitron_cli.config.align import AlignConfig
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.interrupts import Interrupted, Interrupts
from minitron_cli.distill.learner import NotFinite
from minitron_cli.distill.logs import Log, open_logs
from minitron_cli.errors import RunError
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.runtime.state import save_state
from minitron_cli.tokens import batch_rows

BAD_BATCH = "not-finite.step-{}.safetensors"
WINDOW = 10
"""Steps whose mean KL is held against the budget."""
SILENT = 20
"""Steps without two different rewards for any prompt, after which nothing is left to learn."""


@dataclass(frozen=True)
class Stop:
    """Why a run ended before its last step: `name` for programs, `words` for people."""

    name: str
    words: str


class Run:
    """`step` steps are done; `figures` of each of them and `measurements` are their history, part of a checkpoint."""

    def __init__(
        self, config: AlignConfig, prompts: Sequence[Prompt], teaching: Teaching, yardstick: Yardstick, partial: Path
    ) -> None:
        self.config, self.prompts, self.teaching, self.yardstick = config, prompts, teaching, yardstick
        self.cast, self.partial, self.group = teaching.cast, partial, teaching.group
        self.checkpoints = Checkpoints(partial, config.keep, group=self.group)
        self.step = 0
        self.figures: list[dict[str, float]] = []
        self.measurements: list[Measurement] = []
        self.logs: list[Log] = []

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, if there is one.

        Raises:
            ConfigError: what `--log` names refuses to start.
        """
        saved = self.checkpoints.newest()
        if saved is not None:
            tensors, values = dict(saved[0]), saved[1]
            self.yardstick.before = tensors.pop("reference.rewards")
            if self.config.moving_anchor:
                self.cast.restore_anchor(tensors)
            self.cast.learner.restore(tensors)
            self.step, self.figures = values["step"], values["figures"]
            self.measurements = [Measurement(**each) for each in values["measurements"]]
            say(f"Resuming at step {self.step} of {self.config.steps}.")
        measured = {each.step for each in self.measurements}
        if self.group.main:
            self.logs = open_logs(self.config.log, self.partial, self.config.out, self.step, measured)

    def close(self) -> None:
        """Finish the logs."""
        for log in self.logs:
            log.close()

    def save(self) -> None:
        """Write a checkpoint of this step; the log that leads to it is on disk first."""
        for log in self.logs:
            log.sync()
        tensors = self.cast.learner.tensors() | {"reference.rewards": self.yardstick.reference()}
        if self.config.moving_anchor:
            tensors |= self.cast.anchor_tensors()
        measurements = [each.to_json() for each in self.measurements]
        self.checkpoints.save(
            self.step, tensors, {"step": self.step, "figures": self.figures, "measurements": measurements}
        )

    def finish(self) -> Stop | None:
        """Train to the last step or until a rail stops it, which is returned.

        Raises:
            RewardFailed: the reward cannot judge a response; what was done is saved.
            RunError: the numbers stopped being finite.
        """
        try:
            with Interrupts(self.group) as interrupts:
                stop = self._train(interrupts)
        except (Interrupted, RewardFailed) as stopped:
            if self.step and (self.group.size == 1 or isinstance(stopped, Interrupted)):  # a reward fails in one alone
                self.save()
                say(f"Saved at step {self.step} of {self.config.steps}.")
            if isinstance(stopped, Interrupted):
                stopped.again()
            raise
        self.save()  # what follows may fail too: the reward of another text, or the disk
        return stop

    def _train(self, interrupts: Interrupts) -> Stop | None:
        config, saved = self.config, self.step
        with Progress("align", config.steps, "steps", start=self.step, rate_unit="responses") as progress:
            while self.step < config.steps:
                if self.step % config.eval_every == 0:
                    self.measure()
                stop = self.stopped()
                if stop is not None:
                    say(stop.words)
                    return stop
                with interrupts.shielded():
                    if self.step % config.save_every == 0 and self.step != saved:
                        self.save()
                        saved = self.step
                    written = self.advance()
                progress.advance(1, rated=written, note=self._note())
        return None

    def _note(self) -> str:
        last = self.figures[-1]
        return f"reward {last['reward']:.3f}  KL {last['kl']:.3f}"

    def measure(self) -> None:
        """Reward and KL of the policy now, once per step."""
        if self.measurements and self.measurements[-1].step == self.step:
            return
        # Each process measures, and all go by what the first one found: a reward may be a judge who changes its mind.
        found = self.group.from_main(self.yardstick.measure(self.step))
        self.measurements.append(found)
        figures = {name: value for name, value in found.to_json().items() if name != "step"}
        self._log({"step": self.step, "validation": figures.pop("reward"), **figures})

    def stopped(self) -> Stop | None:
        """Whether a rail ends the run here; a function of its history alone."""
        config, recent = self.config, self.figures[-WINDOW:]
        mean = sum(each["kl"] for each in recent) / max(len(recent), 1)
        if config.kl_budget is not None and recent and mean >= config.kl_budget:
            words = f"The KL reached the budget of {config.kl_budget:g} nats at step {self.step}."
            return Stop("kl budget", words)
        if config.patience is not None:
            rewards = [each.reward for each in self.measurements]
            since = len(rewards) - 1 - rewards.index(max(rewards)) if rewards else 0
            if since >= config.patience:
                return Stop("plateau", f"The reward has not risen in {since} measurements, at step {self.step}.")
        silent = self.figures[-SILENT:]
        if len(silent) == SILENT and all(each["ties"] == 1 for each in silent):
            return Stop(
                "no signal",
                f"All responses to a prompt have had equal rewards for {SILENT} steps, so nothing is left to learn at "
                f"step {self.step}.",
            )
        return None

    def advance(self) -> int:
        """One optimizer step; returns the responses that were written for it."""
        began = time.monotonic()
        config, cast = self.config, self.cast
        if config.anchor_every is not None and self.step and self.step % config.anchor_every == 0:
            cast.copy_policy()
        rows = batch_rows(config.seed, self.step, config.batch_size, len(self.prompts))
        lesson = self.teaching.lesson([self.prompts[row] for row in rows], self.step)
        update = self._update(lesson)
        if config.method == "jbond":
            cast.follow(config.eta)
        self.step += 1
        self.figures.append(lesson.figures)
        written = config.batch_size * (config.own_samples + config.anchor_samples)
        rate = round(written / max(time.monotonic() - began, 1e-9), 1)
        self._log({"step": self.step, **lesson.figures, **vars(update), "responses_per_second": rate})
        return written

    def _log(self, record: dict[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def _update(self, lesson: Lesson) -> Update:
        config, cast = self.config, self.cast
        try:
            return cast.learner.update(
                lesson.responses, lesson.weights, config.batch_size, self.step, words=cast.words, size=cast.size
            )
        except NotFinite as error:
            path = self.partial / BAD_BATCH.format(self.step + 1)
            tensors = {"ids": lesson.responses.ids, "real": lesson.responses.real, "weights": lesson.weights}
            if self.group.main:
                save_state(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {"step": self.step + 1})
            self.group.wait()
            found = self.checkpoints.found()
            kept = f"{found[-1]} is the last checkpoint" if found else "no checkpoint was due before it"
            raise RunError(
                f"{error} Its batch is in {path} and {kept}; try a lower --lr or --dtype float32, or look at the batch."
            ) from error
