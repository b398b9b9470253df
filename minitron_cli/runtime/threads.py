"""How OpenMP threads wait for each other. Must run before torch is imported, so this module imports nothing heavy."""

from __future__ import annotations

import os


def yield_while_waiting() -> None:
    """Let a waiting thread spin for microseconds and then sleep, unless the user chose a policy.

    Small models have many short parallel regions. On a machine shared with any other process, a thread that spins for
    long takes the core its peer needs, and a forward pass becomes several times slower; sleeping at once wastes time
    on an idle machine. `benchmarks/threads.py` measures both.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU OpenMP, in turns of its loop
        os.environ["KMP_BLOCKTIME"] = "1"  # LLVM and Intel OpenMP, in milliseconds
