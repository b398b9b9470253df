"""Options of `minitron search`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from minitron_cli.config.base import StageConfig, argument, option
from minitron_cli.config.importance import LayerScore
from minitron_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SearchConfig(StageConfig):
    """Find the best smaller shape within budgets: zero-shot loss, then a short distillation of the best few."""

    checkpoint: str = argument("Checkpoint to shrink: directory, Hub id or builtin:tiny-py.", keyed=False)
    params: str | None = option(None, "Parameter budget: 4B, 350M, or 50% of the original.")
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
        "75% ffn.",
        commas=True,
    )
    list: bool = option(False, "Print the feasible candidates and stop; needs config.json only.", keyed=False)
    importance: Path | None = option(None, "Scores from `minitron importance`.", keyed=False)
    data: Path | None = option(None, "Prepared data set.", keyed=False)
    out: Path | None = option(None, "Directory to write; appears only when complete.", keyed=False)
    force: bool = option(False, "Replace an existing output directory.", keyed=False)
    candidates: Annotated[int, Ge(1)] = option(
        16, "Candidates measured zero-shot: the largest of the window, spread over shapes."
    )
    finalists: Annotated[int, Ge(0)] = option(
        3, "Best candidates that are distilled briefly; 0 trusts the zero-shot loss."
    )
    steps: Annotated[int, Ge(1)] = option(100, "Optimizer steps of the short distillation.")
    batch_size: Annotated[int, Ge(1)] = option(32, "Sequences per optimizer step.")
    lr: Annotated[float, Gt(0)] = option(1e-4, "Peak learning rate of the short distillation.")
    warmup: Annotated[float, Ge(0), Lt(1)] = option(0.05, "Share of the steps that warm up linearly.")
    min_lr: Annotated[float, Ge(0), Le(1)] = option(0.1, "Final learning rate as a share of the peak.")
    eval_sequences: Annotated[int, Ge(1)] = option(128, "Validation sequences per loss.")
    layer_score: LayerScore = option(
        "auto", "What decides which layers leave; auto is what `minitron importance` was told to find, else bi."
    )
    save_every: Annotated[int, Ge(1)] = option(100, "Steps between checkpoints of the short distillation.", keyed=False)
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
        if not self.list:
            for name in ("importance", "data", "out"):
                if getattr(self, name) is None:
                    raise ConfigError(f"search needs --{name} (only --list does without).")

    @property
    def timed(self) -> bool:
        """Whether a budget has to be measured."""
        return self.latency is not None or self.throughput is not None
