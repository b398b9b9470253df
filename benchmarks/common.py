"""What every benchmark prints first, and how they measure: interleaved rounds in one process, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

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
