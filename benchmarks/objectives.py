"""Training objectives compared: width- and depth-pruned students of small models, paired by seed.

python -m benchmarks.objectives [--shared DIR] [--seeds 3] [--steps 300] [--arms depth,width]

All students of a model learn from the same batches in the same order under one teacher forward, with the same learning
rate; seeds differ in that order (and in the projection's start). Effects are paired differences of validation losses in
nats per token. A direction is reproduced, or not, where all seeds agree on it and the mean exceeds their standard
deviation; a claim that something changes nothing, where no seed differs by more than the margin.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.data import DataConfig  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.data.prepare import run_data  # noqa: E402
from minitron_cli.distill.intermediate import Matching  # noqa: E402
from minitron_cli.distill.stage import run_distill  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.evaluate.perplexity import evaluate_split  # noqa: E402
from minitron_cli.importance.stage import run_importance  # noqa: E402
from minitron_cli.importance.store import load_scores  # noqa: E402
from minitron_cli.manifest import fingerprint  # noqa: E402
from minitron_cli.models.load import load_model  # noqa: E402
from minitron_cli.models.states import Listener  # noqa: E402
from minitron_cli.prune.plan import PrunePlan, make_plan  # noqa: E402
from minitron_cli.runtime.progress import Progress, set_quiet  # noqa: E402
from minitron_cli.search.measure import cut_in_memory  # noqa: E402
from minitron_cli.tokens import TokenDataset, batch_rows  # noqa: E402
from minitron_cli.tokens.stream import read_rows  # noqa: E402

SEQ_LEN, BATCH, RATE, TOKENS = 128, 6, 1e-3, 2_000_000
VALIDATION = 192
MARGIN = 0.01
"""Nats below which a difference is none."""
CPU = torch.device("cpu")

LOSSES: dict[str, dict[str, Any]] = {
    "kl": {},
    "ce": {"loss": "ce"},
    "reverse kl": {"loss": "rkl"},
    "kl + ce": {"loss": "kl+ce"},
    "jsd 0.5": {"loss": "jsd:0.5"},
    "kl, T 0.5": {"temperature": 0.5},
    "kl, T 3": {"temperature": 3.0},
}
BOTH = ("embeddings", "blocks")
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "depth": {
        **LOSSES,
        "kl + blocks": {"states": ("blocks",)},
        "kl + blocks, embeddings": {"states": BOTH},
        "kl + blocks, embeddings, alpha 1": {"states": BOTH, "alpha": 1.0},
        "kl + blocks to last, embeddings": {"states": BOTH, "layers_map": "last-2:last"},
    },
    "width": {**LOSSES, "kl + blocks, embeddings": {"states": BOTH}},
}
"""Students, and what each is trained on; layers are mapped last-2:last-2 where nothing else is said."""


@dataclass(frozen=True)
class Claim:
    """`better` has the lower loss than `worse`; or, with `equal`, the same."""

    student: str
    better: str
    worse: str
    paper: str
    equal: bool = False


CLAIMS = (
    Claim("depth", "kl", "ce", "KD above CE on MMLU, HellaSwag (Table 14)"),
    Claim("width", "kl", "ce", "KD above CE on MMLU, HellaSwag (Table 14)"),
    Claim("depth", "kl", "reverse kl", "2.155 < 2.665 (Table 16)"),
    Claim("width", "kl", "reverse kl", "2.107 < 2.140, both with CE (Table 15)"),
    Claim("depth", "kl", "kl + ce", "2.107 < 2.117 (Table 15)"),
    Claim("width", "kl", "kl + ce", "2.107 < 2.117 (Table 15)"),
    Claim("depth", "kl", "kl, T 0.5", "1 is best of 0.1, 0.5, 1, 3 (no numbers)"),
    Claim("depth", "kl", "kl, T 3", "1 is best of 0.1, 0.5, 1, 3 (no numbers)"),
    Claim("width", "kl", "kl, T 0.5", "1 is best of 0.1, 0.5, 1, 3 (no numbers)"),
    Claim("width", "kl", "kl, T 3", "1 is best of 0.1, 0.5, 1, 3 (no numbers)"),
    Claim("depth", "kl", "jsd 0.5", ""),
    Claim("width", "kl", "jsd 0.5", ""),
    Claim("depth", "kl + blocks", "kl", "2.145 < 2.155 (Table 17)"),
    Claim("depth", "kl + blocks, embeddings", "kl + blocks", "2.141 < 2.145 (Table 17)"),
    Claim("depth", "kl + blocks, embeddings", "kl + blocks to last, embeddings", "2.141 < 2.203 (Table 17)"),
    Claim("depth", "kl", "kl + blocks to last, embeddings", "2.155 < 2.203 (Table 17)"),
    Claim("width", "kl + blocks, embeddings", "kl", "the same (Table 18)", equal=True),
    Claim("depth", "kl + blocks, embeddings", "kl + blocks, embeddings, alpha 1", "dynamic is better (no numbers)"),
)
"""What Minitron (arXiv 2407.14679) says; no words where it says nothing."""


@dataclass
class World:
    """A model, text it knows, and its students."""

    name: str
    teacher: str
    source: str
    cuts: dict[str, dict[str, int]]
    correction: int = 0
    """Steps that the teacher is first trained on the text, which is not quite what it learned from."""
    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Validation losses by student and arm, one per seed."""


TINY_PY = World(
    "tiny-py on the Python standard library", "builtin:tiny-py", "python-stdlib",
    {"depth": {"layers": 3}, "width": {"hidden": 96, "ffn": 224}},
)  # fmt: skip


def stories(shared: Path) -> World:
    """The model of 260,000 parameters with stories like those it was trained on, but lower-cased: a teacher that knows
    less of the text than its students soon do teaches nothing.
    """
    text = shared / "text" / "tinystories_lowercase_4M.txt"
    cuts = {"depth": {"layers": 3}, "width": {"hidden": 48, "ffn": 96}}
    return World("stories260K on TinyStories", str(shared / "models" / "stories260K"), str(text), cuts, correction=300)


def compare(world: World, arms: Sequence[str], seeds: int, steps: int, directory: Path) -> None:
    """Train every arm with every seed; fills `world.found`."""
    data, scored = directory / "data", directory / "importance"
    run_data(DataConfig(sources=(world.source,), tokenizer=world.teacher, seq_len=SEQ_LEN, max_tokens=TOKENS, out=data))
    if world.correction:
        world.teacher = _corrected(world, data, directory / "corrected")
    run_importance(ImportanceConfig(checkpoint=world.teacher, data=data, samples=256, loss_samples=32, out=scored))
    checkpoint, dataset = Checkpoint(resolve(world.teacher)), TokenDataset(data)
    removed = {checkpoint.shape["layers"] - cut["layers"] for cut in world.cuts.values() if "layers" in cut}
    scores, words = load_scores(scored, checkpoint.shape, fingerprint(checkpoint.path), "auto", removed)
    teacher = Teacher(load_model(checkpoint.path, device=CPU, dtype=torch.float32))
    print(f"{world.name}: teacher {_loss(teacher.model, dataset):.4f}")
    plans = {}
    for student in arms:
        plans[student] = make_plan(checkpoint.shape, scores, world.cuts[student], ranked_by=words)
        loss = _loss(cut_in_memory(checkpoint, plans[student], CPU, torch.float32), dataset)
        print(f"  {student}: {plans[student].params_after:,} parameters, {loss:.4f} before training")
    for seed in range(seeds):
        _train(world, checkpoint, plans, teacher, dataset, seed, steps)


def _corrected(world: World, data: Path, out: Path) -> str:
    """The teacher after cross-entropy on the text (arXiv 2408.11796, section 3), in an order no student sees."""
    config = DistillConfig(
        student=world.teacher, data=data, out=out, loss="ce", steps=world.correction, batch_size=4 * BATCH, lr=RATE,
        seed=1000, eval_every=world.correction, eval_sequences=1,
    )  # fmt: skip
    run_distill(config)
    return str(out)


def _train(
    world: World, checkpoint: Checkpoint, plans: dict[str, PrunePlan], teacher: Teacher, dataset: TokenDataset,
    seed: int, steps: int,
) -> None:  # fmt: skip
    """All arms of one seed side by side: the teacher sees each batch once."""
    trainers: dict[tuple[str, str], Trainer] = {}
    listeners = []
    for student, plan in plans.items():
        for arm, options in ARMS[student].items():
            config = DistillConfig(
                student=student, teacher=world.teacher, data=Path("data"), out=Path("out"), steps=steps,
                batch_size=BATCH, lr=RATE, seed=seed, **options,
            )  # fmt: skip
            model = cut_in_memory(checkpoint, plan, CPU, torch.float32)
            matching = _matching(config, checkpoint, model)
            if matching is not None:
                listeners.append(matching.teacher_listener(teacher.model))
            states = matching.loss(model) if matching else None
            trainers[student, arm] = Trainer(model, config, steps, torch.float32, states)
    taps = {place: tap for listener in listeners for place, tap in listener.taps.items()}
    teacher.listener = Listener(taps, checkpoint.shape.sizes)
    train = dataset.split("train")
    with Progress(f"{world.name}, seed {seed}", steps, "steps") as progress:
        for step in range(steps):
            batch = Batch.read(read_rows(train, batch_rows(seed, step, BATCH, len(train))), CPU)
            lesson = teacher.lesson(batch)
            for trainer in trainers.values():
                trainer.update([batch], [lesson], step)
            progress.advance()
    for key, trainer in trainers.items():
        world.found.setdefault(key, []).append(_loss(trainer.model, dataset))


def _matching(config: DistillConfig, checkpoint: Checkpoint, model: Any) -> Matching | None:
    if not config.states:
        return None
    return Matching.of(config, checkpoint.shape, type(checkpoint.shape).of(model.config.to_dict()))


def _loss(model: Any, dataset: TokenDataset) -> float:
    split = dataset.split("validation")
    return float(evaluate_split(model, split, batch_size=32, max_sequences=VALIDATION).loss)


def verdict(differences: Sequence[float], claim: Claim) -> str:
    """What paired differences (worse - better) say of a claim."""
    if not claim.paper:
        return "no claim"
    if len(differences) == 1:
        return "inconclusive (one seed)"
    if claim.equal:
        small = [abs(each) < MARGIN for each in differences]
        return "reproduced" if all(small) else "inconclusive" if any(small) else "not reproduced"
    clear = abs(statistics.mean(differences)) > statistics.stdev(differences)
    if clear and min(differences) > 0:
        return "reproduced"
    return "not reproduced" if clear and max(differences) < 0 else "inconclusive"


def report(world: World) -> None:
    """Final losses of every arm, then each claim with our differences."""
    print(f"\n{world.name}: validation loss after training, mean of the seeds [each]")
    for (student, arm), losses in sorted(world.found.items(), key=lambda item: (item[0][0], statistics.mean(item[1]))):
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"  {student:<6}{arm:<34}{statistics.mean(losses):.4f}  [{each}]")
    print(f"\n  {'paired differences of validation losses':<72}mean +- deviation  verdict, and the paper")
    for claim in CLAIMS:
        if (claim.student, claim.better) not in world.found:
            continue
        pairs = zip(world.found[claim.student, claim.worse], world.found[claim.student, claim.better], strict=True)
        differences = [worse - better for worse, better in pairs]
        spread = f" +- {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        title = f"{claim.student}: {claim.better} {'as' if claim.equal else 'below'} {claim.worse}"
        told = f"; paper: {claim.paper}" if claim.paper else ""
        print(f"  {title:<72}{statistics.mean(differences):+.4f}{spread:<11}  {verdict(differences, claim)}{told}")


def main() -> None:
    """Train, then print losses, differences and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/stories260K and text/, for the second model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--arms", default="depth,width", help="students to train: depth, width or both")
    options = parser.parse_args()
    arms = options.arms.split(",")
    per_step = BATCH * SEQ_LEN
    heading(f"Objectives: {options.seeds} seeds, {options.steps} steps of {per_step} tokens, learning rate {RATE}")
    worlds = [TINY_PY]
    if options.shared is not None:
        worlds.append(stories(options.shared))
        if not Path(worlds[-1].teacher).is_dir():
            parser.error(f"{worlds[-1].teacher} is not there; --shared names the folder that holds models/ and text/")
    began = time.monotonic()
    set_quiet(True)
    for world in worlds:
        with TemporaryDirectory() as directory:
            compare(world, arms, options.seeds, options.steps, Path(directory))
        report(world)
        print(f"\n{time.monotonic() - began:.0f} s so far\n")


if __name__ == "__main__":
    main()
