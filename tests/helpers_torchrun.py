"""Start what torchrun starts, on ports of its own, so that tests can run beside each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes: int, *what: str) -> dict[str, Any]:
    """Arguments of subprocess for so many processes of a module (`-m`, name, ...) or a script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {"args": [*start, *what], "env": environment, "text": True}


def launch(processes: int, arguments: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(**torchrun(processes, "-m", "minitron_cli", *arguments), capture_output=True, timeout=timeout)
