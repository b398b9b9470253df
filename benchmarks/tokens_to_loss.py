"""How many training tokens a better cut saves: students of one teacher on the same batches in the same order.

python -m benchmarks.tokens_to_loss [--shared DIR] [--seeds 3] [--steps 400] [--samples 256]

`paper` ranks by activations, changes no weight (arXiv 2407.14679) and is distilled with forward KL; every other arm
is cut to the same sizes another way and trained just so. Tokens are those an arm needs until its validation loss is
what `paper` has at the end, between two evaluations by linear interpolation.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading  # noqa: E402
from benchmarks.worlds import World, worlds  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.config.prune import PruneConfig  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.evaluate.perplexity import evaluate_split  # noqa: E402
from minitron_cli.importance.stage import run_importance  # noqa: E402
from minitron_cli.models.load import load_model  # noqa: E402
from minitron_cli.prune.stage import run_prune  # noqa: E402
from minitron_cli.runtime.progress import Progress, set_quiet  # noqa: E402
from minitron_cli.tokens import TokenDataset, batch_rows, read_rows  # noqa: E402

BATCH, RATE, VALIDATION, EVERY = 6, 1e-3, 128, 20
CPU = torch.device("cpu")
KEPT = {"hidden": 0.75, "ffn": 0.5}
PAPER: dict[str, Any] = {"rescale": "off", "rotate": "off", "width_score": "activation", "repair": "off"}
REPAIRED: dict[str, Any] = {**PAPER, "repair": "on"}
BETTER: dict[str, Any] = {"repair": "on", "width_score": "fluctuation"}
ROTATED: dict[str, Any] = {**PAPER, "rotate": "on"}
ARMS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "repair": REPAIRED,
    "fluctuation, repair": {**PAPER, **BETTER},
    "rotate": ROTATED,
    "rotate, fluctuation, repair": {**ROTATED, **BETTER},
    "rotate, rescale, fluctuation, repair": {**ROTATED, **BETTER, "rescale": "measured"},
}


@dataclass
class Curve:
    """Validation losses of one student of one seed: (tokens trained on, loss)."""

    points: list[tuple[int, float]] = field(default_factory=list)

    def tokens_to(self, loss: float) -> float | None:
        """Tokens until the loss is first reached; None where it never is."""
        if self.points[0][1] <= loss:
            return float(self.points[0][0])
        for (before, high), (after, low) in zip(self.points, self.points[1:], strict=False):
            if low <= loss:
                return before + (after - before) * (high - loss) / (high - low)
        return None


@dataclass
class Comparison:
    """All arms of one model."""

    world: World
    directory: Path
    steps: int
    samples: int
    curves: dict[str, list[Curve]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    params: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = self.world.prepared(self.directory / "data")
        self.dataset = TokenDataset(self.data)
        self.checkpoint = Checkpoint(resolve(self.world.model))
        self.sizes = {axis: int(self.checkpoint.shape[axis] * share) for axis, share in KEPT.items()}
        self.teacher = Teacher(load_model(self.checkpoint.path, device=CPU, dtype=torch.float32))

    def run(self, seed: int) -> None:
        """Cut and train every arm; the teacher sees each batch once for all of them."""
        set_quiet(True)
        paths = self._cut(seed)
        set_quiet(False)
        config = DistillConfig(
            student=self.world.model, teacher=self.world.model, data=self.data, out=self.directory / "unused",
            steps=self.steps, batch_size=BATCH, lr=RATE, seed=seed,
        )  # fmt: skip
        trainers = {
            arm: Trainer(load_model(path, device=CPU, dtype=torch.float32), config, self.steps, torch.float32)
            for arm, path in paths.items()
        }
        curves = {arm: Curve() for arm in trainers}
        train, tokens = self.dataset.split("train"), 0
        with Progress(f"{self.world.name}, seed {seed}", self.steps, "steps") as progress:
            for step in range(self.steps):
                if step % EVERY == 0:
                    self._evaluate(trainers, curves, tokens)
                batch = Batch.read(read_rows(train, batch_rows(seed, step, BATCH, len(train))), CPU)
                lesson = self.teacher.lesson(batch)
                for trainer in trainers.values():
                    trainer.update([batch], [lesson], step)
                tokens += batch.ids.numel()
                progress.advance()
        self._evaluate(trainers, curves, tokens)
        for arm, curve in curves.items():
            self.curves[arm].append(curve)

    def _evaluate(self, trainers: dict[str, Trainer], curves: dict[str, Curve], tokens: int) -> None:
        for arm, trainer in trainers.items():
            curves[arm].points.append((tokens, self.loss(trainer.model.eval())))
            trainer.model.train()

    def loss(self, model: Any) -> float:
        """Validation loss in nats per token."""
        found = evaluate_split(model, self.dataset.split("validation"), batch_size=32, max_sequences=VALIDATION)
        return float(found.loss)

    def _cut(self, seed: int) -> dict[str, Path]:
        """Every arm's student, scored and repaired on this seed's draw of sequences."""
        scored = self.directory / f"importance-{seed}"
        run_importance(
            ImportanceConfig(
                checkpoint=self.world.model, data=self.data, out=scored, samples=self.samples, loss_samples=0,
                seed=seed,
            )
        )  # fmt: skip
        paths = {}
        for number, (arm, options) in enumerate(ARMS.items()):
            base = {"checkpoint": self.world.model, "importance": scored, **options}
            if options["repair"] == "on":
                base |= {"data": self.data, "repair_samples": self.samples, "seed": seed}
            paths[arm] = self.directory / f"student-{seed}-{number}"
            self.params[arm] = run_prune(PruneConfig(**base, **self.sizes, out=paths[arm])).params_after
        return paths

    def report(self) -> None:
        """Losses before and after training, and the tokens to where `paper` ends."""
        whole = self.loss(self.teacher.model)
        kept = ", ".join(f"{axis} {self.checkpoint.shape[axis]} -> {size}" for axis, size in self.sizes.items())
        print(f"\n{self.world.name}: teacher {whole:.3f}; {kept}; {self.curves['paper'][0].points[-1][0]:,} tokens\n")
        print(f"  {'':<38}{'parameters':>11}{'before':>9}{'after':>9}{'tokens to the end of paper':>30}{'share':>8}")
        goals = [curve.points[-1][1] for curve in self.curves["paper"]]
        for arm, curves in self.curves.items():
            reached = [curve.tokens_to(goal) for curve, goal in zip(curves, goals, strict=True)]
            counts = [count for count in reached if count is not None]
            shares = [count / curve.points[-1][0] for count, curve in zip(counts, curves, strict=False)]
            told = ", ".join("never" if count is None else f"{count:,.0f}" for count in reached)
            share = f"{statistics.mean(shares):.0%}" if len(counts) == len(reached) else "-"
            before, after = (statistics.mean(curve.points[place][1] for curve in curves) for place in (0, -1))
            print(f"  {arm:<38}{self.params[arm]:>11,}{before:>9.3f}{after:>9.3f}{told:>30}{share:>8}")


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/stories260K, for the second model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=256, help="calibration sequences")
    options = parser.parse_args()
    heading(f"Tokens to the same loss: {options.seeds} seeds, {options.steps} steps, learning rate {RATE}")
    with TemporaryDirectory() as temporary:
        for number, world in enumerate(worlds(options.shared, Path(temporary))):
            comparison = Comparison(world, Path(temporary) / str(number), options.steps, options.samples)
            for seed in range(options.seeds):
                comparison.run(seed)
            comparison.report()


if __name__ == "__main__":
    main()
