"""Options of `minitron distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from minitron_cli.config.base import WritingConfig, argument, option, required
from minitron_cli.config.objective import Objective, parse_objective
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistillConfig(WritingConfig):
    """Retrain a student: by default forward KL on the logits of a live teacher. The same command again resumes."""

    student: str = argument("Checkpoint to train: directory, Hub id or builtin:tiny-py.", keyed=False)
    teacher: str | None = option(None, "Checkpoint to learn from (not used by --loss ce).", keyed=False)
    data: Path = required("Prepared data set.", keyed=False)
    steps: Annotated[int, Ge(1)] | None = option(None, "Optimizer steps.")
    tokens: Annotated[int, Ge(1)] | None = option(None, "Training tokens, instead of --steps.")
    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step.")
    micro_batch: Annotated[int, Ge(1)] | None = option(None, "Sequences per forward pass; default the whole batch.")
    loss: str = option(
        "kl",
        "kl: forward KL to the teacher; ce: cross-entropy (conventional retraining); "
        "rkl, jsd:BETA, skl:ALPHA, tv, mse, cosine, topk:K; or a weighted sum like 0.9*kl+0.1*ce.",
    )
    init: Literal["student", "random"] = option("student", "random: the student's shape with fresh weights.")
    temperature: Annotated[float, Gt(0)] = option(1.0, "Softmax temperature of both models (not of ce, mse, cosine).")
    lr: Annotated[float, Gt(0)] = option(1e-4, "Peak learning rate.")
    min_lr: Annotated[float, Ge(0), Le(1)] = option(0.1, "Final learning rate as a share of the peak (cosine).")
    warmup: Annotated[float, Ge(0), Lt(1)] = option(0.05, "Share of the steps that warm up linearly.")
    weight_decay: Annotated[float, Ge(0)] = option(0.1, "AdamW weight decay, on matrices only.")
    beta1: Annotated[float, Ge(0), Lt(1)] = option(0.9, "AdamW beta 1.")
    beta2: Annotated[float, Ge(0), Lt(1)] = option(0.95, "AdamW beta 2.")
    clip: Annotated[float, Gt(0)] = option(1.0, "Largest global gradient norm.")
    save_every: Annotated[int, Ge(1)] = option(200, "Steps between checkpoints.", keyed=False)
    eval_every: Annotated[int, Ge(1)] = option(200, "Steps between validation losses.", keyed=False)
    eval_sequences: Annotated[int, Ge(1)] = option(256, "Validation sequences (the first ones of the split).")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the data order and of --init random.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Compute type; auto is bf16 on CUDA, else fp32.")

    @property
    def objective(self) -> Objective:
        """What `loss` says."""
        return parse_objective(self.loss)

    def check(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("Give --steps or --tokens, one of the two.")
        try:
            objective = self.objective
        except ConfigError as error:
            raise ConfigError(f"--loss: {error}") from None
        if objective.needs_teacher and self.teacher is None:
            raise ConfigError(f"--loss {self.loss} needs --teacher CKPT; conventional retraining is --loss ce.")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}.")
