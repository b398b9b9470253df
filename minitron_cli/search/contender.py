"""One candidate in training, with its curve; saved and restored on its own, so that groups and kills change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.fused import Lesson
from minitron_cli.distill.losses import TopK
from minitron_cli.distill.trainer import Batch, NotFinite, Trainer
from minitron_cli.runtime.progress import say

Point = dict[str, float]
"""`step`, and what was measured there: `loss` (nats per token of validation text), `kl`, tasks' errors."""


@dataclass
class Curve:
    """What is known of a candidate's training: `step` steps are done, with these training losses and points.

    `failed` is the step at which its numbers stopped being finite; it learns no more.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    failed: int | None = None

    def at(self, step: int) -> Point | None:
        """What was measured after so many steps."""
        return next((point for point in self.points if point["step"] == step), None)

    def reached(self, step: int) -> bool:
        """Whether nothing is left to do up to a step."""
        return self.failed is not None or self.at(step) is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, from which `Curve(**value)` is made."""
        return {"step": self.step, "losses": self.losses, "points": self.points, "failed": self.failed}


class Contender:
    """A trainer and its curve."""

    def __init__(self, name: str, trainer: Trainer, checkpoints: Checkpoints) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        self.name, self.trainer, self.checkpoints = name, trainer, checkpoints
        self.curve = Curve()
        saved = checkpoints.newest()
        if saved is not None:
            tensors, values = saved
            trainer.restore(tensors)
            self.curve = Curve(**values)
        self._saved = self._state if saved is not None else None

    @property
    def _state(self) -> tuple[int, int, int | None]:
        """Changes whenever there is something new to save."""
        return self.curve.step, len(self.curve.points), self.curve.failed

    @property
    def model(self) -> Any:
        """In fp32, as it is trained."""
        return self.trainer.model

    def learn(self, batches: Sequence[Batch], lessons: Iterable[Lesson | TopK]) -> None:
        """One optimizer step; where its numbers are not finite, this candidate has failed."""
        try:
            update = self.trainer.update(batches, lessons, self.curve.step)
        except NotFinite as error:
            self.fail(str(error))
            return
        finally:
            # Made anew in the next step; kept, they would stand in the way of the other candidates.
            self.trainer.optimizer.zero_grad(set_to_none=True)
        self.curve.step += 1
        self.curve.losses.append(update.loss)

    def fail(self, reason: str) -> None:
        """Leave the competition."""
        self.curve.failed = self.curve.step
        say(f"{self.name} leaves the search: {reason}")

    def save(self) -> None:
        """Write weights, optimizer and curve, where they are not on disk already."""
        if self._state != self._saved:
            self.checkpoints.save(self.curve.step, self.trainer.tensors(), self.curve.to_json())
            self._saved = self._state
