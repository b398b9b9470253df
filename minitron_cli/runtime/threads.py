"""How OpenMP threads wait for each other. Must run before torch is imported, so this module imports nothing heavy."""

from __future__ import annotations

import os


def yield_while_waiting() -> None:
    """Let waiting threads sleep instead of spin, unless the user chose a policy.

    Small models have many short parallel regions. On a machine shared with any other process, a spinning thread takes
    the core its peer needs, and a forward pass becomes up to ten times slower (benchmarks/threads.py); on an idle
    machine sleeping costs next to nothing.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
