"""One checkpoint in a process of its own, measured on request: its memory is then its own, and so are its threads."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from minitron_cli.errors import UserError
from minitron_cli.models.load import load_model
from minitron_cli.runtime.memory import give_back_freed, peak_rss_bytes
from minitron_cli.runtime.progress import set_quiet

RESET_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """What is generated: `batch_size` prompts of `context` tokens, then `new_tokens` for each, greedily."""

    batch_size: int
    context: int
    new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One generation: seconds until the first token, seconds of each further one, largest memory in bytes.

    Memory is that of weights, cache and activations: what torch allocated on CUDA; elsewhere the process's resident
    memory beyond what it had before the model was loaded.
    """

    first_token: float
    tokens: tuple[float, ...]
    peak_bytes: int


class Meter:
    """Largest memory since the last reset, beyond that of construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Forget the peak so far; where the system cannot (not Linux), it includes the loading."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif RESET_PEAK.exists():
            RESET_PEAK.write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if RESET_PEAK.exists():
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024 - self.before
        return peak_rss_bytes() - self.before


def serve(pipe: Connection, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load, then answer each `Case` that comes through the pipe with a `Sample`, until the pipe is closed.

    What goes wrong is sent as an exception.
    """
    set_quiet(True)
    meter = Meter(device)
    try:
        model = load_model(path, device=device, dtype=dtype)
        gc.collect()
        give_back_freed()
        pipe.send(None)
        while True:
            pipe.send(generate(model, pipe.recv(), meter))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # nobody asks any more
    except UserError as error:
        pipe.send(error)
    except (MemoryError, RuntimeError) as error:
        pipe.send(RuntimeError(str(error).splitlines()[0] if str(error) else type(error).__name__))


def generate(model: Any, case: Case, meter: Meter) -> Sample:
    """Continue prompts of fixed pseudo-random tokens."""
    words = model.get_input_embeddings().num_embeddings
    choice = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (case.batch_size, case.context), generator=choice).to(meter.device)
    meter.reset()
    times = [_now(meter.device)]
    for _ in greedy(model, ids, case.new_tokens):
        times.append(_now(meter.device))
    first, *others = (later - earlier for earlier, later in itertools.pairwise(times))
    return Sample(first, tuple(others), meter.peak())


def greedy(model: Any, ids: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """The likeliest next tokens (batch, 1), one after another: the prompt (batch, seq) at once, then with a cache."""
    cache = None
    for _ in range(count):
        with torch.inference_mode():
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        yield ids


def _now(device: torch.device) -> float:
    """The time when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
