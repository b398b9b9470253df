"""`minitron prune` against `cp -r` of its input: seconds and peak memory, both from outside, both with cold files.

Before each run all files are written back and dropped from the page cache (fsync, then POSIX_FADV_DONTNEED). `cp` does
not wait for the disk; `prune` does (fsync), and that counts. The cut is planned beforehand and timed with --plan, so
that both read the input once; the time with ranking by weight norms, a second pass, is printed apart. Start-up is the
time until the same command refuses a missing plan, and the import of the stock classes, which overlaps with the copy.

python -m benchmarks.prune_scale [--shape 1b|8b] [--directory DIR] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import heading
from minitron_cli.checkpoint.blocks import BLOCK_BYTES, Array, Produce, Workspace
from minitron_cli.checkpoint.writer import Planned, weight_files
from minitron_cli.families import family_for
from minitron_cli.manifest import write_json

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], dict[str, int], float]] = {
    "1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
        | {"tie_word_embeddings": True},
        {"hidden": 1536, "ffn": 6144},
        8e9,
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
        | {"tie_word_embeddings": False},
        {"hidden": 3072, "ffn": 9216},
        45e9,
    ),
}
"""Sizes of Llama-3.2-1B and Llama-3.1-8B, what they are cut to (the latter: Minitron's 4B width), bytes of disk."""


@dataclass(frozen=True)
class Noise:
    """Random bf16 weights around 0.02: random sign and fraction, exponents 2^-7 and 2^-6."""

    nbytes: int
    seed: int

    def blocks(self) -> Iterator[tuple[int, Produce]]:
        for place in range(0, self.nbytes, BLOCK_BYTES):
            yield place, partial(self._values, place)

    def _values(self, place: int, workspace: Workspace) -> Array:
        random = np.random.default_rng((self.seed, place))
        count = min(BLOCK_BYTES, self.nbytes - place) // 2
        return (random.integers(0, 1 << 16, count, np.uint16) & np.uint16(0x80FF)) | np.uint16(0x3C00)


@dataclass(frozen=True)
class Run:
    """What one command took; `cpu` is user and system time, which a busy machine distorts less."""

    seconds: float
    cpu: float
    peak_bytes: int
    stdout: str


def timed(*command: str | Path) -> Run:
    """Run a command to its end: seconds by the clock outside, peak resident memory as the kernel counted it."""
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, stdout)


def drop_caches(directory: Path) -> None:
    """Let the next reader of any file below find it on disk only."""
    for file in directory.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def make_checkpoint(path: Path, config: dict[str, Any]) -> int:
    """Random weights of a shape, written block by block; returns their bytes."""
    path.mkdir()
    write_json(path / "config.json", config)
    family = family_for(config)
    sizes = family.sizes(config)
    planned = [Planned(name, "BF16", family.tensor_shape(each, sizes)) for name, each, _ in family.expected(config)]
    weight_files(path, [(item, Noise(item.nbytes, seed)) for seed, item in enumerate(planned)]).fill()
    return sum(item.nbytes for item in planned)


def refused_after(*command: str | Path) -> float:
    """Seconds until a command line with a wrong path is refused: interpreter, imports, parsing."""
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True)
    if done.returncode != 2:
        raise SystemExit(f"{' '.join(map(str, command))} was to be refused")
    return time.perf_counter() - began


def main() -> None:
    """Print seconds, ratio and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--directory", type=Path, help="where to work; its disk is measured (default: temporary)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config, target, needed = SHAPES[options.shape]
    with TemporaryDirectory(prefix="prune_scale", dir=options.directory) as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            raise SystemExit(f"--shape {options.shape} needs {needed / 1e9:.0f} GB and {name} has {free / 1e9:.0f} GB.")
        cut = " ".join(f"{axis} {size}" for axis, size in target.items())
        heading(f"Pruning the {options.shape} shape to {cut}")
        measure(Path(name), LLAMA | config, target, options.rounds)


def measure(work: Path, config: dict[str, Any], target: dict[str, int], rounds: int) -> None:
    """Plan once, then alternate copy and prune."""
    source, copy, out, plan = (work / each for each in ("source", "copy", "out", "plan.json"))
    nbytes = make_checkpoint(source, config)
    minitron = (sys.executable, "-m", "minitron_cli", "prune", source, "--out", out, "--json", "--quiet")
    sizes = [word for axis, size in target.items() for word in (f"--{axis}", str(size))]
    plan.write_text(timed(*minitron, *sizes, "--dry-run").stdout)
    commands = {
        "cp -r": ("cp", "-r", source, copy),
        "prune --plan": (*minitron, "--plan", plan),
        "prune by norms": (*minitron, *sizes),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            drop_caches(work)
            runs[name].append(timed(*command))
            written = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.exists() else 0
            for directory in (copy, out):
                shutil.rmtree(directory, ignore_errors=True)
    print(f"{nbytes / 1e9:.2f} GB in, {written / 1e9:.2f} GB out; median of {rounds} rounds (all of them)\n")
    base = statistics.median(run.seconds for run in runs["cp -r"])
    for name, each in runs.items():
        seconds, cpu = (statistics.median(values) for values in zip(*((r.seconds, r.cpu) for r in each), strict=True))
        line = f"{name:<16}{seconds:8.2f} s{seconds / base:8.2f} x cp{cpu:8.2f} s cpu"
        if name != "cp -r":
            told = max(json.loads(run.stdout)["peak_rss_bytes"] for run in each)
            line += f"   peak {max(run.peak_bytes for run in each) / 1e6:.0f} MB (it says {told / 1e6:.0f})"
        print(f"{line}   [{', '.join(f'{run.seconds:.1f}' for run in each)}]")
    start = statistics.median(refused_after(*minitron, "--plan", work / "none") for _ in range(rounds))
    stock = statistics.median(
        timed(sys.executable, "-c", "import minitron_cli.models.load").seconds for _ in range(rounds)
    )
    print(f"\nof which start-up {start:.2f} s; beside the copy, import of the stock classes {stock:.2f} s")


if __name__ == "__main__":
    main()
