"""Teacher correction (arXiv 2408.11796): the unpruned teacher, fine-tuned on the corpus that it will teach.

Where that is not the teacher's own training data, a corrected teacher is the better one. Which units are important does
not change much, so pruning may start from either; the student learns from the corrected one.
"""

from __future__ import annotations

from minitron_cli.config.correct import CorrectConfig
from minitron_cli.distill.plan import TrainingPlan
from minitron_cli.distill.stage import DistillResult, plan_training, train


def plan_correct(config: CorrectConfig) -> TrainingPlan:
    """What `correct --dry-run` prints.

    Raises:
        UserError: the input is wrong.
    """
    return plan_training(config.training(), "teacher")


def run_correct(config: CorrectConfig) -> DistillResult:
    """Train the teacher with cross-entropy and write it as a plain checkpoint of the type it came in.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: the numbers or the disk failed midway; the last checkpoint is kept.
    """
    return train(config.training(), "teacher", "correct", config)
