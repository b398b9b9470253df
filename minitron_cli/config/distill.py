"""Options of `minitron distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from minitron_cli.config.base import ExportingConfig, WritingConfig, argument, option, required
from minitron_cli.config.intermediate import parse_layers_map
from minitron_cli.config.objective import Objective, parse_objective
from minitron_cli.config.sharding import ShardingConfig
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig(WritingConfig):
    """What to train on, and how much of it."""

    data: Path = required(
        "Prepared data set; or with --seq-len, text to tokenise while training runs: a JSONL, Parquet or text file, a "
        "directory of them, a Hub data set id, or `python-stdlib`.",
        keyed=False,
    )
    seq_len: Annotated[int, Ge(2)] | None = option(None, "Tokens per sequence of text that is tokenised on the way.")
    text_column: str = option("text", "Column of its JSONL, Parquet and Hub rows that holds the text.")
    messages: str | None = option(None, "Column of chat messages, as in `data prepare`.")
    subset: str | None = option(None, "Configuration name of a Hub data set.")
    hub_split: str = option("train", "Split of a Hub data set to read.")
    val_data: Path | None = option(
        None, "Prepared data set or text for the validation loss. Default: the validation split; of text, 1 in 40 "
        "documents, chosen by hash, which training leaves out.", keyed=False,
    )  # fmt: skip
    steps: Annotated[int, Ge(1)] | None = option(None, "Optimizer steps.")
    tokens: Annotated[int, Ge(1)] | None = option(None, "Training tokens, instead of --steps.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ExportingConfig):
    """How weights change, and how often they are saved: of every stage that trains."""

    checkpoint_activations: bool = option(False, "Recompute activations instead of keeping them: less memory, slower.")
    lr: Annotated[float, Gt(0)] = option(1e-4, "Peak learning rate.")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "Learning rate after the warm-up; wsd: constant, then a linear decay over the last --decay."
    )
    min_lr: Annotated[float, Ge(0), Le(1)] = option(0.1, "Final learning rate as a share of the peak.")
    warmup: Annotated[float, Ge(0)] = option(0.05, "Linear warm-up: a share of the steps, or a number of them from 1.")
    decay: Annotated[float, Gt(0), Le(1)] = option(0.2, "Share of all steps in which --schedule wsd decays.")
    weight_decay: Annotated[float, Ge(0)] = option(0.1, "AdamW weight decay, on matrices only.")
    beta1: Annotated[float, Ge(0), Lt(1)] = option(0.9, "AdamW beta 1.")
    beta2: Annotated[float, Ge(0), Lt(1)] = option(0.95, "AdamW beta 2.")
    clip: Annotated[float, Gt(0)] = option(1.0, "Largest global gradient norm.")
    save_every: Annotated[int, Ge(1)] = option(200, "Steps between checkpoints.", keyed=False)
    keep: Annotated[int, Ge(1)] = option(1, "Checkpoints to keep while training; 2 survive a damaged one.", keyed=False)
    log: Literal["tensorboard", "wandb"] | None = option(
        None, "Where to log besides the console and log.jsonl.", keyed=False
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Compute type; auto is bf16 on CUDA, else fp32.")

    def check(self) -> None:
        super().check()
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigError(f"--warmup {self.warmup:g} is neither a share below 1 nor a whole number of steps.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(OptimizerConfig, TextConfig, ShardingConfig):
    """How to train: data, length, optimizer, how often to save and to look."""

    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step, of all processes together.")
    micro_batch: Annotated[int, Ge(1)] | None = option(
        None, "Sequences per forward pass; default: the most that memory allows. Results do not depend on it."
    )
    compile: bool = option(False, "Compile the student's blocks with torch.compile; needs a C++ compiler.")
    eval_every: Annotated[int, Ge(1)] = option(200, "Steps between validation losses.", keyed=False)
    eval_sequences: Annotated[int, Ge(1)] = option(256, "Validation sequences (the first ones of the split).")
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the data order and of --init random.")

    def check(self) -> None:
        super().check()
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("Give --steps or --tokens, one of the two.")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}.")


DEFAULT_TOP_K = 128
"""The fewest words that cost at most 0.01 nats of validation loss (benchmarks/cached_teacher.py)."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingConfig):
    """Retrain a student: by default forward KL on the logits of a live teacher. The same command again resumes."""

    student: str = argument("Checkpoint to train: directory, Hub id or builtin:tiny-py.", keyed=False)
    teacher: str | None = option(
        None, "Checkpoint to learn from, or what --cache-teacher wrote (not used by --loss ce).", keyed=False
    )
    cache_teacher: Path | None = option(
        None, "Directory for the teacher's likeliest words: written once, then read by any number of students.",
        keyed=False,
    )  # fmt: skip
    top_k: Annotated[int, Ge(1)] | None = option(
        None, f"Words per token of a cached teacher; default {DEFAULT_TOP_K}, or all that the cache holds.", keyed=False
    )
    loss: str = option(
        "kl",
        "kl: forward KL to the teacher; ce: cross-entropy (conventional retraining); "
        "rkl, jsd:BETA, skl:ALPHA, tv, mse, cosine, topk:K; or a weighted sum like 0.9*kl+0.1*ce.",
    )
    init: Literal["student", "random"] = option("student", "random: the student's shape with fresh weights.")
    temperature: Annotated[float, Gt(0)] = option(1.0, "Softmax temperature of both models (not of ce, mse, cosine).")
    states: tuple[Literal["embeddings", "blocks", "mlp_inputs", "attention"], ...] = option(
        (), "Intermediate states to match too: embeddings, blocks, mlp_inputs, attention (relations of queries, keys, "
        "values). For students that lost layers: embeddings,blocks.", commas=True,
    )  # fmt: skip
    layers_map: str = option(
        "last-2:last-2", "Layers whose --states are matched, TEACHER:STUDENT, from 0: last-2:last-2 or 29:13,31:15."
    )
    state_loss: Literal["cosine", "mse", "both"] = option(
        "cosine", "Distance of states (attention is always KL); mse is relative to the teacher's squared length."
    )
    alpha: Annotated[float, Gt(0)] | None = option(
        None, "Weight of the states' loss; default: the ratio of both losses, anew at each step."
    )

    @property
    def objective(self) -> Objective:
        """What `loss` says."""
        return parse_objective(self.loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything compares with a teacher."""
        return self.objective.needs_teacher or bool(self.states)

    def check(self) -> None:
        super().check()
        try:
            objective = self.objective
        except ConfigError as error:
            raise ConfigError(f"--loss: {error}") from None
        if objective.needs_teacher and self.teacher is None:
            raise ConfigError(f"--loss {self.loss} needs --teacher CKPT; conventional retraining is --loss ce.")
        try:
            parse_layers_map(self.layers_map)
        except ConfigError as error:
            raise ConfigError(f"--layers-map: {error}") from None
        if self.states:
            self._check_states()
        elif self.alpha is not None:
            raise ConfigError("--alpha weighs intermediate states; add --states blocks, or leave it out.")

    def _check_states(self) -> None:
        if self.teacher is None:
            raise ConfigError("--states needs --teacher CKPT, whose states the student's are compared with.")
        if self.cache_teacher is not None:
            raise ConfigError("--states needs a live teacher: a cache holds no states. Leave out --cache-teacher.")
        if self.compile:
            raise ConfigError("--states reads states inside the layers, which --compile fuses; leave out one of them.")
