"""Streamed scoring against a plain forward pass over the same calibration set, at two depths of equal layer size:
memory follows the layer, not the model.

python -m benchmarks.importance_scale [--layers 8,32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import PeakMemory, heading  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.importance.activations import Activations  # noqa: E402
from minitron_cli.importance.gather import Gathered  # noqa: E402
from minitron_cli.importance.stream import StreamedSweep  # noqa: E402
from minitron_cli.models.head import backbone_output  # noqa: E402
from minitron_cli.models.load import load_model, new_model  # noqa: E402
from minitron_cli.models.streaming import StreamedModel, weight_bytes  # noqa: E402
from minitron_cli.runtime.progress import set_quiet  # noqa: E402
from minitron_cli.tokens import Split  # noqa: E402

SHAPE = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SAMPLES, LENGTH, BATCH, ROUNDS = 32, 256, 4, 3
CPU = torch.device("cpu")


def calibration() -> Split:
    """Random tokens: what is measured does not depend on them."""
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (SAMPLES, LENGTH)).astype(np.uint16)
    return Split("train", tokens, None, 1.0)


def plain(path: Path) -> None:
    """Load the model and forward every calibration sequence."""
    model = load_model(path, device=CPU, dtype=torch.float32)
    split = calibration()
    with torch.inference_mode():
        for start in range(0, SAMPLES, BATCH):
            backbone_output(model, torch.from_numpy(split.rows(range(start, start + BATCH))))


def streamed(path: Path) -> None:
    """All width scores and block importance, one layer in memory."""
    config = ImportanceConfig(checkpoint="c", data=path, out=path, batch_size=BATCH, samples=SAMPLES)
    model = StreamedModel(Checkpoint(path), device=CPU, dtype=torch.float32)
    with TemporaryDirectory(dir=path) as directory:
        size = (SAMPLES, LENGTH, SHAPE["hidden_size"])
        states = Activations(size, torch.float32, Path(directory) / "states", place=CPU)
        rows, state = list(range(SAMPLES)), Path(directory) / "state"
        StreamedSweep(model, Gathered(model, config), states, config, calibration(), rows, state).run()


RUNS = {"plain forward": plain, "streamed scores": streamed}


def measured(name: str, path: Path) -> dict[str, float]:
    """Seconds and memory beyond the imports, of one run in this process."""
    memory, began = PeakMemory(), time.perf_counter()
    RUNS[name](path)
    return {"seconds": time.perf_counter() - began, "bytes": memory.beyond()}


def main() -> None:
    """Print seconds, ratio and memory for each depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="8,32")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_quiet(True)
    if arguments.run:
        print(json.dumps(measured(arguments.run[0], Path(arguments.run[1]))))
        return
    heading(f"Scoring {SAMPLES} sequences of {LENGTH} tokens with one layer in memory, loading included")
    for layers in map(int, arguments.layers.split(",")):
        with TemporaryDirectory() as directory:
            path = Path(directory)
            new_model({**SHAPE, "num_hidden_layers": layers}, seed=0, dtype=torch.float32).save_pretrained(path)
            show(path, layers)


def show(path: Path, layers: int) -> None:
    """Interleaved rounds of one depth, each run in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(ROUNDS):
        for name in RUNS:
            command = [sys.executable, "-m", "benchmarks.importance_scale", "--run", name, str(path)]
            found[name].append(json.loads(subprocess.check_output(command, text=True)))
    sizes = weight_bytes(Checkpoint(path), 4)
    print(f"{layers} layers of {sizes[0] / 1e6:.0f} MB, {sum(sizes.values()) / 1e6:.0f} MB in all")
    base = statistics.median(each["seconds"] for each in found["plain forward"])
    for name, values in found.items():
        seconds = statistics.median(each["seconds"] for each in values)
        peak = statistics.median(each["bytes"] for each in values)
        print(f"  {name:<16}{seconds:8.2f} s{seconds / base:8.2f} x plain{peak / 1e6:10.0f} MB beyond the imports")


if __name__ == "__main__":
    main()
