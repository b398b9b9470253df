"""The bench stage: two checkpoints side by side, in alternating rounds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron_cli.bench.chart import draw
from minitron_cli.bench.summary import Summary, compare, summarise
from minitron_cli.bench.worker import Case, Sample, serve
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.bench import BenchConfig
from minitron_cli.errors import ConfigError, RunError, UserError
from minitron_cli.manifest import StageOutput, fingerprint, write_json
from minitron_cli.models.load import context_length
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.memory import require_memory
from minitron_cli.runtime.progress import Progress, say

RESULT, PLOT = "bench.json", "bench.svg"


@dataclass(frozen=True)
class BenchResult:
    """Keys of `--json`. The numbers at the top are the first case's; `peak_bytes` is the largest of all cases.

    `ratio`: the checkpoint's value over the other's, None where it was measured alone.
    """

    out: str | None
    checkpoint: str
    against: str | None
    device: str
    dtype: str
    threads: int
    rounds: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int
    ratio: dict[str, float] | None
    models: list[dict[str, Any]]
    cases: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_bench(config: BenchConfig) -> BenchResult:
    """Measure every case (batch size and context) in rounds; the checkpoints take turns within a round.

    Raises:
        UserError: the input is wrong, or memory is too small.
        RunError: a model failed while it was measured.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    checkpoints = [_checkpoint(name) for name in (config.checkpoint, config.against) if name is not None]
    cases = [Case(batch, context, config.new_tokens) for batch in config.batch_size for context in config.context]
    for checkpoint in checkpoints:
        _require_context(checkpoint, cases)
    _require_memory(checkpoints, cases, device, dtype)
    output = None
    if config.out is not None:
        inputs = {str(number): fingerprint(checkpoint.path) for number, checkpoint in enumerate(checkpoints)}
        output = StageOutput(config.out, "bench", config, inputs, force=config.force)
        if output.result is not None:
            say(f"{config.out} is up to date; --force measures again.")
            return BenchResult(**output.result)
    if output is None:
        return _measured(config, checkpoints, cases, device, dtype)
    with output:
        result = _measured(config, checkpoints, cases, device, dtype)
        write_json(output.partial / RESULT, result.to_json())
        (output.partial / PLOT).write_text(draw(result.to_json()), "utf-8")
        output.commit(result.to_json())
    return result


def _checkpoint(name: str) -> Checkpoint:
    checkpoint = Checkpoint(resolve(name))
    checkpoint.require_unquantised()
    _ = checkpoint.declared
    return checkpoint


def _require_context(checkpoint: Checkpoint, cases: Sequence[Case]) -> None:
    """Refuse more tokens than the model is made for.

    Raises:
        ConfigError: a case has more.
    """
    most, longest = context_length(dict(checkpoint.config)), max(case.context + case.new_tokens for case in cases)
    if most is not None and longest > most:
        raise ConfigError(
            f"{checkpoint.path} has a context of {most} tokens, and --context with --new-tokens needs {longest}; "
            "give less."
        )


def _require_memory(
    checkpoints: Sequence[Checkpoint], cases: Sequence[Case], device: torch.device, dtype: torch.dtype
) -> None:
    size, parts = dtype.itemsize, {"weights": 0, "KV cache": 0}
    for checkpoint in checkpoints:
        parts["weights"] += checkpoint.shape.params * size
        caches = [case.batch_size * checkpoint.shape.kv_bytes(case.context + case.new_tokens, size) for case in cases]
        parts["KV cache"] = max(parts["KV cache"], *caches)
    require_memory(parts, device, "Give a smaller --batch-size or --context, or measure without --against")


def _measured(
    config: BenchConfig, checkpoints: Sequence[Checkpoint], cases: Sequence[Case], device: torch.device,
    dtype: torch.dtype,
) -> BenchResult:  # fmt: skip
    summaries = _run_cases(checkpoints, cases, config.rounds, device, dtype)
    rows = []
    for case, found in zip(cases, summaries, strict=True):
        row: dict[str, Any] = {"batch_size": case.batch_size, "context": case.context, "checkpoint": asdict(found[0])}
        row |= {"against": asdict(found[1]), "ratio": compare(*found)} if config.against is not None else {}
        rows.append(row)
    first = summaries[0][0]
    return BenchResult(
        out=str(config.out) if config.out is not None else None,
        checkpoint=config.checkpoint,
        against=config.against,
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rounds=config.rounds,
        prefill_tokens_per_second=first.prefill_tokens_per_second,
        decode_tokens_per_second=first.decode_tokens_per_second,
        peak_bytes=max(found[0].peak_bytes for found in summaries),
        ratio=rows[0].get("ratio"),
        models=[_sizes(checkpoint, dtype) for checkpoint in checkpoints],
        cases=rows,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    shape = checkpoint.shape
    return {
        "params": shape.params,
        "shape": shape.label(),
        "weight_bytes": shape.params * dtype.itemsize,
        "kv_bytes_per_token": shape.kv_bytes_per_token(dtype.itemsize),
    }


def _run_cases(
    checkpoints: Sequence[Checkpoint], cases: Sequence[Case], rounds: int, device: torch.device, dtype: torch.dtype
) -> list[list[Summary]]:
    """Summaries by case, then checkpoint."""
    with _Workers(checkpoints, device, dtype) as workers, Progress("bench", len(cases) * rounds, "rounds") as progress:
        found = []
        for case in cases:
            samples: list[list[Sample]] = [[] for _ in checkpoints]
            workers.warm_up(case)
            for turn in range(rounds):
                # Who begins changes, so that a trend of the machine's speed favours nobody.
                order = range(len(checkpoints)) if turn % 2 == 0 else reversed(range(len(checkpoints)))
                for number in order:
                    samples[number].append(workers.ask(number, case))
                progress.advance(note=f"batch {case.batch_size}, context {case.context}")
            sizes = [checkpoint.shape for checkpoint in checkpoints]
            total = case.context + case.new_tokens
            found.append(
                [
                    summarise(case, each, case.batch_size * shape.kv_bytes(total, dtype.itemsize))
                    for each, shape in zip(samples, sizes, strict=True)
                ]
            )
    return found


class _Workers:
    """One process per checkpoint; only one of them works at a time."""

    def __init__(self, checkpoints: Sequence[Checkpoint], device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoints = checkpoints
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for checkpoint in checkpoints:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs, checkpoint.path, device, dtype), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> _Workers:
        try:
            for number in range(len(self.pipes)):
                self._receive(number)  # the model is loaded
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()

    def warm_up(self, case: Case) -> None:
        """Let every process allocate what the case needs and choose its kernels."""
        for number in range(len(self.pipes)):
            self.ask(number, Case(case.batch_size, case.context, 2))

    def ask(self, number: int, case: Case) -> Sample:
        """One measurement."""
        self.pipes[number].send(case)
        sample: Sample = self._receive(number)
        return sample

    def _receive(self, number: int) -> Any:
        path = self.checkpoints[number].path
        try:
            found = self.pipes[number].recv()
        except (EOFError, ConnectionResetError):
            self.processes[number].join()
            raise RunError(
                f"The process that measures {path} ended by itself (exit status {self.processes[number].exitcode}); "
                "the system may have run out of memory: give a smaller --batch-size or --context."
            ) from None
        if isinstance(found, UserError):
            raise found
        if isinstance(found, Exception):
            raise RunError(f"{path} cannot be measured: {str(found).rstrip('.')}.") from found
        return found
