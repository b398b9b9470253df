"""How OpenMP threads wait (runtime/threads.py): forward passes on a machine that is otherwise idle,
and with one busy neighbour process per core.

python -m benchmarks.threads
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

BODY = """
import time, torch
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.models.load import load_model
model = load_model(resolve("builtin:tiny-py"), device=torch.device("cpu"), dtype=torch.float32)
ids = torch.randint(0, 2048, (8, 256))
with torch.inference_mode():
    model(ids)
    began = time.perf_counter()
    for _ in range(2):
        model(ids)
print(2 * ids.numel() / (time.perf_counter() - began))
"""
POLICIES = {
    "minitron": {"GOMP_SPINCOUNT": "1000"},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "library default": {},
}
ROUNDS = 2


def main() -> None:
    """Print tokens per second of each policy, rounds interleaved."""
    cores = os.cpu_count() or 1
    print(f"Forward passes of builtin:tiny-py, {cores} CPU cores\n")
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for neighbours in (0, cores):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        rates: dict[str, list[float]] = {name: [] for name in POLICIES}
        try:
            for _ in range(ROUNDS):
                for name, policy in POLICIES.items():
                    command = [sys.executable, "-c", BODY]
                    rates[name].append(float(subprocess.check_output(command, env=clean | policy, text=True)))
        finally:
            for process in busy:
                process.kill()
        print(f"{neighbours} busy neighbours")
        for name, values in rates.items():
            print(f"  {name:<18}{statistics.median(values):12,.0f} tokens/s")


if __name__ == "__main__":
    main()
