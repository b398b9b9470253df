"""Options of `minitron correct`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from minitron_cli.config.base import argument, option
from minitron_cli.config.distill import DistillConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class CorrectConfig(TrainingConfig):
    """Fine-tune a teacher on the corpus it will teach, where that is not the one it was trained on."""

    teacher: str = argument("Checkpoint to correct: directory, Hub id or builtin:tiny-py.", keyed=False)
    lr: Annotated[float, Gt(0)] = option(
        6e-5, "Peak learning rate: about a fifth of the peak it was trained with (3e-4 for many 8B models)."
    )

    def training(self) -> DistillConfig:
        """The same as conventional retraining of the teacher itself."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainingConfig)}
        return DistillConfig(student=self.teacher, loss="ce", **shared)
