"""Options of `minitron search`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from minitron_cli.config.base import argument, option
from minitron_cli.config.importance import LayerScore, WidthScore
from minitron_cli.config.prune import Rotate
from minitron_cli.config.ranking import Mix, parse_mix
from minitron_cli.config.sharding import ShardingConfig
from minitron_cli.errors import ConfigError

DEFAULT_STEPS = 400
"""What Minitron (arXiv 2407.14679, section 3) gives every candidate."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ShardingConfig):
    """Find the best smaller shape within budgets: zero-shot loss, then short distillation that halves the field."""

    checkpoint: str = argument("Checkpoint to shrink: directory, Hub id or builtin:tiny-py.", keyed=False)
    params: str | None = option(
        None, "Parameter budget: 4B, 350M, or 50% of the original; a family of sizes is 6B,4B,2B."
    )
    tolerance: str = option("5%", "Half width of the window around --params.")
    params_range: str | None = option(None, "The window itself, LO:HI, each like --params; bounds inclusive.")
    count: Literal["total", "non-embedding", "active"] = option(
        "total", "Which parameters the budget counts; active leaves out experts that a token does not pass."
    )
    weight_bytes: str | None = option(None, "Most bytes of weights: 8GB, 7.5GiB, or 50% of the original.")
    weight_bits: Annotated[float, Gt(0), Le(64)] | None = option(
        None, "Bits per weight for --weight-bytes; default the checkpoint's dtype."
    )
    kv_bytes: str | None = option(None, "Most bytes of KV cache (16 bit) of one sequence of --context tokens.")
    context: Annotated[int, Ge(1)] | None = option(
        None, "Tokens of context for --kv-bytes, --flops and measured speed."
    )
    flops: str | None = option(None, "Most operations per token (two per parameter, and attention over --context).")
    latency: str | None = option(None, "Most time per token, measured on --device with random weights: 20ms.")
    throughput: Annotated[float, Gt(0)] | None = option(None, "Least tokens per second, measured likewise.")
    measure: Literal["decode", "prefill"] = option(
        "decode", "What --latency and --throughput time: one new token after --context, or reading --context."
    )
    measure_seconds: Annotated[float, Gt(0)] = option(2.0, "Time spent measuring each candidate, after its warm-up.")
    grid: tuple[str, ...] = option(
        (),
        "axis=values: hidden=96,112 or layers=29..32 or ffn=256..1024/64 or ffn=2.5x,3x (of hidden) or heads=auto; "
        "repeat per axis, or auto. Default without --list: auto.",
    )
    max_cut: tuple[str, ...] = option(
        (),
        "Largest cut in automatic grids: 40%, or layers=20% for one axis; repeat. Default 25% layers, 50% hidden, "
        "75% ffn, 50% experts and expert-ffn.",
        commas=True,
    )
    list: bool = option(False, "Print the feasible candidates and stop; needs config.json only.", keyed=False)
    importance: Path | None = option(None, "Scores from `minitron importance`.", keyed=False)
    data: Path | None = option(None, "Prepared data set.", keyed=False)
    out: Path | None = option(None, "Directory to write; appears only when complete.", keyed=False)
    force: bool = option(False, "Replace an existing output directory.", keyed=False)
    candidates: Annotated[int, Ge(1)] = option(
        16, "Candidates of each size measured zero-shot: the largest of the window, spread over shapes."
    )
    finalists: Annotated[int, Ge(0)] = option(
        8, "Best candidates of each size that are distilled; 0 trusts the zero-shot loss."
    )
    rungs: Annotated[int, Ge(1)] = option(
        3, "Times that they are compared: half of them leaves each time, and training is twice as long. 1: no halving."
    )
    steps: Annotated[int, Ge(1)] | None = option(
        None, f"Optimizer steps of a candidate that passes all rungs; default {DEFAULT_STEPS}."
    )
    tokens: Annotated[int, Ge(1)] | None = option(None, "Training tokens of such a candidate, instead of --steps.")
    rank: str = option(
        "loss",
        "What decides, lower is better: validation loss, kl (to the teacher), the error of a task of `minitron eval`, "
        "or a weighted sum like loss+0.5*arc_easy.",
    )
    task_dir: Path | None = option(
        None, "Folder with the files of --rank's tasks, so that nothing is downloaded: MMLU as CSV.", keyed=False
    )
    task_limit: Annotated[int, Ge(1)] | None = option(None, "Questions per task of --rank; default all.")
    teacher: str | None = option(None, "Checkpoint to learn from; default the checkpoint itself.", keyed=False)
    cache_teacher: Path | None = option(
        None, "Directory for the teacher's likeliest words, as in `distill`.", keyed=False
    )
    top_k: Annotated[int, Ge(1)] | None = option(None, "Words per token of a cached teacher.", keyed=False)
    loss: str = option("kl", "What candidates are trained on, as in `distill`.")
    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step.")
    micro_batch: Annotated[int, Ge(1)] | None = option(
        None, "Sequences per forward pass; default: the most that memory allows. Results do not depend on it."
    )
    checkpoint_activations: bool = option(False, "Recompute activations instead of keeping them: less memory, slower.")
    lr: Annotated[float, Gt(0)] = option(1e-4, "Peak learning rate; one schedule spans all rungs.")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "Learning rate after the warm-up.")
    warmup: Annotated[float, Ge(0)] = option(0.05, "Linear warm-up: a share of the steps, or a number of them from 1.")
    min_lr: Annotated[float, Ge(0), Le(1)] = option(0.1, "Final learning rate as a share of the peak.")
    weight_decay: Annotated[float, Ge(0)] = option(0.1, "AdamW weight decay, on matrices only.")
    eval_sequences: Annotated[int, Ge(1)] = option(128, "Validation sequences per loss.")
    eval_every: Annotated[int, Ge(1)] = option(200, "Steps between validation losses, beside those that rank.")
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    width_score: WidthScore = option(
        "auto", "What decides which neurons and heads leave: activation, contribution, fluctuation; as in `prune`."
    )
    rotate: Rotate = option("auto", "Whether candidates with fewer hidden channels are rotated first, as in `prune`.")
    save_every: Annotated[int, Ge(1)] = option(100, "Steps between checkpoints of the candidates.", keyed=False)
    seed: Annotated[int, Ge(0)] = option(0, "Seed of the data order.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Compute type; auto is bf16 on CUDA, else fp32.")

    def check(self) -> None:
        if self.params is not None and self.params_range is not None:
            raise ConfigError("Give --params or --params-range, one of the two.")
        others = (self.weight_bytes, self.kv_bytes, self.flops, self.latency, self.throughput)
        if self.params is None and self.params_range is None and all(other is None for other in others):
            raise ConfigError(
                "Give a budget: --params or --params-range (one of the two), --weight-bytes, --kv-bytes, --flops, "
                "--latency or --throughput."
            )
        if self.kv_bytes is not None and self.context is None:
            raise ConfigError("--kv-bytes needs --context: how many tokens the cache holds.")
        if self.weight_bits is not None and self.weight_bytes is None:
            raise ConfigError("--weight-bits says how --weight-bytes counts; give that too.")
        if self.steps is not None and self.tokens is not None:
            raise ConfigError("Give --steps or --tokens, one of the two.")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(f"--batch-size {self.batch_size} is not a multiple of --micro-batch {self.micro_batch}.")
        self._check_rank()
        if not self.list:
            for name in ("importance", "data", "out"):
                if getattr(self, name) is None:
                    raise ConfigError(f"search needs --{name} (only --list does without).")

    def _check_rank(self) -> None:
        mix = self.mix
        if not self.finalists and self.rank != "loss":
            raise ConfigError(f"--rank {self.rank} compares distilled candidates; give --finalists above 0.")
        if mix.needs_kl and (self.cache_teacher is not None or self.loss == "ce"):
            other = "--cache-teacher" if self.cache_teacher is not None else "--loss ce"
            raise ConfigError(f"--rank kl asks a live teacher about validation text; leave out {other}.")
        if not mix.tasks:
            for name in ("task_dir", "task_limit"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name.replace('_', '-')} goes with a task in --rank, such as loss+mmlu.")

    @property
    def mix(self) -> Mix:
        """What `rank` says."""
        return parse_mix(self.rank)

    @property
    def sizes(self) -> tuple[str | None, ...]:
        """The sizes of --params, as written; one None where other budgets decide."""
        return tuple(part.strip() for part in self.params.split(",")) if self.params is not None else (None,)

    @property
    def timed(self) -> bool:
        """Whether a budget has to be measured."""
        return self.latency is not None or self.throughput is not None
