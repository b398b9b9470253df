"""What each way to cut better is worth before any training: validation losses of pruned models.

python -m benchmarks.zero_shot [--shared DIR] [--seeds 3] [--samples 256]

Cuts of 25 % and 50 % of one axis at a time. Every arm is scored, cut and repaired on the same calibration sequences;
seeds differ in their draw (and in the units that the random arm keeps). Losses are in nats per token on validation
text, the mean over seeds, with the range behind it. `paper` ranks neurons, heads and channels by activations (arXiv
2407.14679, section 2) and layers by block importance, and changes no weight; every other arm adds one thing to it, the
last but two all that the axis has a use for; these are the paper's merge of heads.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.common import heading
from benchmarks.head_merge import merge_heads
from benchmarks.worlds import World, worlds
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ShapeError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.importance.layout import SCORES, score_shape, scored_axes
from minitron_cli.importance.stage import run_importance
from minitron_cli.manifest import write_json
from minitron_cli.models.load import load_model
from minitron_cli.prune.plan import make_plan
from minitron_cli.prune.sizes import complete_target
from minitron_cli.prune.stage import run_prune
from minitron_cli.runtime.progress import Progress, set_quiet
from minitron_cli.tokens import TokenDataset

VALIDATION = 128
AXES = ("ffn", "hidden", "heads", "layers")
CUTS = (0.25, 0.5)
PAPER: dict[str, Any] = {
    "rescale": "off",
    "rotate": "off",
    "width_score": "activation",
    "repair": "off",
    "layer_score": "bi",
}
ROTATED = {"rotate": "on"}
ARMS: dict[str, dict[str, Any]] = {
    "random": {},
    "paper": PAPER,
    "rescale": {**PAPER, "rescale": "measured"},
    "rescale, analytic": {**PAPER, "rescale": "analytic"},
    "rotate": {**PAPER, **ROTATED},
    "rotate, untied": {**PAPER, **ROTATED, "untie": True},
    "rotate, rescale": {**PAPER, **ROTATED, "rescale": "measured"},
    "contribution": {**PAPER, "width_score": "contribution"},
    "fluctuation": {**PAPER, "width_score": "fluctuation"},
    "repair": {**PAPER, "repair": "on"},
    "contribution, repair": {**PAPER, "width_score": "contribution", "repair": "on"},
    "fluctuation, repair": {**PAPER, "width_score": "fluctuation", "repair": "on"},
    "rotate, repair": {**PAPER, **ROTATED, "repair": "on"},
    "rotate, rescale, repair": {**PAPER, **ROTATED, "rescale": "measured", "repair": "on"},
}
WIDTH = ("contribution", "fluctuation")
MERGES = {"merge heads": 1.0, "merge heads, other sign": -1.0}
ARMS |= dict.fromkeys(MERGES, PAPER)


def concerns(arm: str, axis: str) -> bool:
    """Whether an arm does something else than the paper's on this axis."""
    if arm in MERGES:
        return axis == "heads"
    if "rescale" in arm or "rotate" in arm:
        return axis == "hidden"
    return axis in ("ffn", "heads") if arm.startswith(WIDTH) else True


@dataclass
class Bench:
    """One model: its losses by (cut, axis, arm)."""

    world: World
    directory: Path
    seeds: int
    samples: int

    def __post_init__(self) -> None:
        self.data = self.world.prepared(self.directory / "data")
        self.dataset = TokenDataset(self.data)
        self.checkpoint = Checkpoint(resolve(self.world.model))
        self.losses: dict[tuple[float, str, str], list[float]] = {}

    def target(self, axis: str, share: float) -> dict[str, int] | str:
        """The size that is left, or why the model cannot have it."""
        shape = self.checkpoint.shape
        size = round(shape[axis] * (1 - share))
        try:
            complete_target(shape, {axis: size})
        except ShapeError as error:
            return str(error)
        return {axis: size}

    def cells(self) -> Iterator[tuple[float, str, dict[str, int]]]:
        """Every cut that the model can have."""
        for share in CUTS:
            for axis in AXES:
                target = self.target(axis, share)
                if isinstance(target, dict):
                    yield share, axis, target

    def run(self) -> None:
        """Measure every cell with every seed."""
        cells = [(*cell, arm) for cell in self.cells() for arm in ARMS if concerns(arm, cell[1])]
        with Progress(self.world.name, self.seeds * len(cells), "models") as progress:
            for seed in range(self.seeds):
                scored = self.directory / f"importance-{seed}"
                set_quiet(True)
                run_importance(
                    ImportanceConfig(
                        checkpoint=self.world.model, data=self.data, out=scored, samples=self.samples, loss_samples=0,
                        seed=seed,
                    )
                )  # fmt: skip
                for share, axis, target, arm in cells:
                    loss = self._cut(scored, target, arm, seed)
                    self.losses.setdefault((share, axis, arm), []).append(loss)
                    set_quiet(False)
                    progress.advance(note=f"{share:.0%} {axis} {arm} {loss:.3f}")
                    set_quiet(True)
        set_quiet(False)

    def _cut(self, scored: Path, target: dict[str, int], arm: str, seed: int) -> float:
        out = self.directory / "out"
        options = ARMS[arm]
        if arm == "random":
            options = {"plan": self._random_plan(target, seed), "repair": "off"}
            target = {}
        repair = (
            {"data": self.data, "repair_samples": self.samples, "seed": seed} if options.get("repair") == "on" else {}
        )
        run_prune(
            PruneConfig(
                checkpoint=self.world.model, out=out, force=True,
                importance=None if arm == "random" else scored, **target, **options, **repair,
            )
        )  # fmt: skip
        if arm in MERGES:
            scores = load_file(scored / SCORES)["group"].astype(np.float64)
            out = Path(shutil.copytree(out, self.directory / "merged", dirs_exist_ok=True))
            merge_heads(self.checkpoint.path, out, scores, MERGES[arm])
        return self.loss(out)

    def _random_plan(self, target: dict[str, int], seed: int) -> Path:
        generator, shape = np.random.default_rng(seed), self.checkpoint.shape
        scores = {axis.name: generator.random(score_shape(shape, axis)) for axis in scored_axes(shape)}
        scores["layers"] = generator.random(shape["layers"])
        file = self.directory / "random.json"
        write_json(file, make_plan(shape, scores, target, ranked_by="chance", rescale="off").to_json())
        return file

    def loss(self, path: Path) -> float:
        """Validation loss of a checkpoint."""
        model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        found = evaluate_split(model, self.dataset.split("validation"), batch_size=32, max_sequences=VALIDATION)
        return float(found.loss)

    def report(self) -> None:
        """One table a cut; axes side by side."""
        shape = self.checkpoint.shape
        print(f"\n{self.world.name}: whole {self.loss(self.checkpoint.path):.3f}")
        for share in CUTS:
            targets = {axis: self.target(axis, share) for axis in AXES}
            heads = [
                f"{axis} {shape[axis]} -> {target[axis]}" if isinstance(target, dict) else f"{axis}: cannot"
                for axis, target in targets.items()
            ]
            print(f"\n  {f'{share:.0%} cut':<26}" + "".join(f"{head:>22}" for head in heads))
            for arm in ARMS:
                print(f"  {arm:<26}" + "".join(f"{self._cell(share, axis, arm):>22}" for axis in AXES))
            for axis, target in targets.items():
                if isinstance(target, str):
                    print(f"  {axis}: {target}")

    def _cell(self, share: float, axis: str, arm: str) -> str:
        losses = self.losses.get((share, axis, arm))
        if losses is None:
            return "-"
        return f"{statistics.mean(losses):.3f} +-{(max(losses) - min(losses)) / 2:.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/stories260K, for the second model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256, help="calibration sequences")
    options = parser.parse_args()
    heading(f"Zero-shot losses of cuts: {options.seeds} seeds, {options.samples} calibration sequences")
    with TemporaryDirectory() as temporary:
        for number, world in enumerate(worlds(options.shared, Path(temporary))):
            bench = Bench(world, Path(temporary) / str(number), options.seeds, options.samples)
            bench.run()
            bench.report()


if __name__ == "__main__":
    main()
