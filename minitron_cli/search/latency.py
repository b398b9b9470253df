"""Time shapes on the present device: random weights of the shape, one sequence, the stock class as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from minitron_cli.config.search import SearchConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.models.load import new_model
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.memory import require_memory
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.search.budget import read_seconds
from minitron_cli.search.enumerate import Candidate
from minitron_cli.shape import Shape

MOST_TIMED = 200
DEFAULT_CONTEXT = 512
FEWEST_STEPS, MOST_STEPS = 3, 64
"""Steps timed per candidate; not more, so that the context stays about what was asked for."""
WARM_UP = 2


class Stopwatch:
    """Measured seconds per token of candidates, in a fixed order; `known` are those measured before."""

    def __init__(self, config: SearchConfig, known: Mapping[str, float] | None = None) -> None:
        self.config, self.seconds = config, dict(known or {})
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.limit = _limit(config)

    def keep_fast(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that meet --latency and --throughput, in the same order.

        Raises:
            InputError: none does, or there are too many to measure.
            ConfigError: --context does not fit the model.
            ResourceError: the largest does not fit into memory.
        """
        self._measure([candidate for candidate in candidates if candidate.name not in self.seconds])
        fast = [candidate for candidate in candidates if self.seconds[candidate.name] <= self.limit]
        if not fast:
            name = min((candidate.name for candidate in candidates), key=lambda name: self.seconds[name])
            raise InputError(
                f"None of the {len(candidates)} shapes that meet the other budgets is fast enough on {self.device}: "
                f"{1e3 * self.limit:.3g} ms per token are asked for, and the fastest takes "
                f"{1e3 * self.seconds[name]:.3g} ms ({name}); relax --latency or --throughput, or widen --grid."
            )
        return fast

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        if not candidates:
            return
        if len(candidates) > MOST_TIMED:
            raise InputError(
                f"{len(candidates)} shapes meet the other budgets, and at most {MOST_TIMED} are measured; narrow "
                "--grid or add a closed-form budget."
            )
        largest = max((candidate.shape for candidate in candidates), key=lambda shape: shape.params)
        context = self._context(largest)
        size = self.dtype.itemsize
        parts = {"weights": largest.params * size, "KV cache": largest.kv_bytes(context + MOST_STEPS, size)}
        require_memory(parts, self.device, "Give a smaller --context or smaller budgets.")
        say(
            f"Measuring {len(candidates)} shapes on {self.device} with random {str(self.dtype).removeprefix('torch.')} "
            f"weights, one sequence: {self._what(context)}, median of {self.config.measure_seconds:g} s each."
        )
        with Progress("measure", len(candidates), "shapes") as progress:
            for candidate in candidates:
                self.seconds[candidate.name] = self._seconds_per_token(candidate.shape, context)
                progress.advance(note=f"{candidate.name} {1e3 * self.seconds[candidate.name]:.3g} ms per token")

    def _what(self, context: int) -> str:
        if self.config.measure == "prefill":
            return f"reading {context:,} tokens at once"
        return f"one new token after {context:,} tokens"

    def _context(self, shape: Shape) -> int:
        """Tokens before the first that is timed.

        Raises:
            ConfigError: positions are a table, and it is too short.
        """
        wanted, positions = self.config.context, shape.sizes.get("positions")
        if positions is None:
            return wanted or DEFAULT_CONTEXT
        most = positions - (WARM_UP + FEWEST_STEPS if self.config.measure == "decode" else 0)
        if wanted is not None and wanted > most:
            raise ConfigError(f"--context {wanted}: this model has {positions} positions; give {most} or fewer.")
        return wanted or min(DEFAULT_CONTEXT, positions // 2)

    def _seconds_per_token(self, shape: Shape, context: int) -> float:
        with self.device:
            model = new_model(dict(shape.config), seed=0, dtype=self.dtype).eval()
            ids = torch.arange(context)[None] % shape["vocab"]
        with torch.inference_mode():
            seconds = self._timed(model, ids, shape.sizes.get("positions"))
        del model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def _timed(self, model: Any, ids: torch.Tensor, positions: int | None) -> float:
        """Seconds per token; ids: (1, context)."""
        context = ids.shape[1]
        if self.config.measure == "prefill":
            return self._median(lambda: _forward(model, ids, None), MOST_STEPS) / context
        steps = MOST_STEPS if positions is None else min(MOST_STEPS, positions - context - WARM_UP)
        cache = _forward(model, ids, None).past_key_values
        return self._median(lambda: _forward(model, ids[:, :1], cache), steps)

    def _median(self, step: Callable[[], Any], most: int) -> float:
        """Median seconds of a step, over `measure_seconds` and at most so many."""
        for _ in range(WARM_UP):
            step()
        taken: list[float] = []
        while len(taken) < FEWEST_STEPS or (sum(taken) < self.config.measure_seconds and len(taken) < most):
            self._wait()
            began = time.perf_counter()
            step()
            self._wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _limit(config: SearchConfig) -> float:
    """Most seconds per token that both budgets allow.

    Raises:
        ConfigError: --latency cannot be read.
    """
    limits = [read_seconds(config.latency)] if config.latency is not None else []
    if config.throughput is not None:
        limits.append(1 / config.throughput)
    return min(limits)
