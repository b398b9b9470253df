"""What every benchmark prints first, and how they measure: interleaved rounds in one process, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from minitron_cli.runtime.doctor import examine


def heading(title: str) -> None:
    """The title, and the machine it ran on."""
    found = examine()
    hardware = found["cuda"] if found["cuda"] != "none" else f"{found['cpu_cores']} CPU cores"
    print(f"{title}\n{hardware}, {torch.get_num_threads()} threads, torch {found['torch']}, python {found['python']}\n")


def interleaved(runs: Mapping[str, Callable[[], None]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each run; rounds alternate, so that a noisy neighbour hits all alike. One warm-up each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """Resident memory beyond what this process holds now, in bytes; Linux only, like /proc."""

    def __init__(self) -> None:
        CLEAR_PEAK.write_text("5")
        self.before = _status("VmRSS")

    def beyond(self) -> int:
        """The peak since construction, less what was held then."""
        return _status("VmHWM") - self.before


CLEAR_PEAK = Path("/proc/self/clear_refs")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
