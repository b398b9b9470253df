"""What sharing the teacher saves: K candidates in a search against K separate runs of `distill`, with equal losses.

python -m benchmarks.search_cost [--candidates 8] [--steps 20] [--rounds 5]

Half-size cuts of the teacher that comes with the installation. Three measurements in one process:
a step of the search (one teacher forward, K student steps) against its parts measured alone, in alternating rounds;
a whole search against cutting and distilling the same candidates one by one, whose losses must be the same;
and what a zero-shot loss without writing the candidate spends its time on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading, interleaved  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.data import DataConfig  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.config.prune import PruneConfig  # noqa: E402
from minitron_cli.config.search import SearchConfig  # noqa: E402
from minitron_cli.data.prepare import run_data  # noqa: E402
from minitron_cli.distill.stage import run_distill  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.evaluate.perplexity import evaluate_split  # noqa: E402
from minitron_cli.importance.stage import run_importance  # noqa: E402
from minitron_cli.importance.store import load_scores  # noqa: E402
from minitron_cli.manifest import fingerprint, write_json  # noqa: E402
from minitron_cli.models.load import load_model, model_from_tensors  # noqa: E402
from minitron_cli.prune.execute import cut_tensors  # noqa: E402
from minitron_cli.prune.plan import PrunePlan, make_plan, planned_config  # noqa: E402
from minitron_cli.prune.stage import run_prune  # noqa: E402
from minitron_cli.runtime.progress import Progress, set_quiet  # noqa: E402
from minitron_cli.search.course import Course  # noqa: E402
from minitron_cli.search.enumerate import spread  # noqa: E402
from minitron_cli.search.joint import JointTraining  # noqa: E402
from minitron_cli.search.journal import Journal  # noqa: E402
from minitron_cli.search.listing import feasible  # noqa: E402
from minitron_cli.search.measure import cut_in_memory  # noqa: E402
from minitron_cli.search.scores import TaskErrors  # noqa: E402
from minitron_cli.search.stage import run_search  # noqa: E402
from minitron_cli.tokens import PreparedSource, TokenDataset  # noqa: E402

TEACHER, BATCH, SEQ_LEN, EVALUATED = "builtin:tiny-py", 8, 256, 32


def prepare(directory: Path) -> None:
    """Text and scores."""
    data = {"sources": ("python-stdlib",), "tokenizer": TEACHER, "seq_len": SEQ_LEN, "max_tokens": 200_000}
    run_data(DataConfig.from_mapping({**data, "out": directory / "data"}))
    run_importance(
        ImportanceConfig(
            checkpoint=TEACHER, data=directory / "data", samples=32, loss_samples=0, out=directory / "importance"
        )
    )


def options(directory: Path, count: int, steps: int) -> SearchConfig:
    """All candidates are trained to the end."""
    return SearchConfig(
        checkpoint=TEACHER, importance=directory / "importance", data=directory / "data", params_range="47%:50%",
        count="non-embedding", candidates=count, finalists=count, rungs=1, steps=steps, batch_size=BATCH, lr=2e-3,
        eval_every=steps, eval_sequences=EVALUATED, out=directory / "search",
    )  # fmt: skip


def compare_steps(directory: Path, count: int, rounds: int) -> None:
    """A step of the search against one teacher forward and as many student steps, each measured alone."""
    config, dataset = options(directory, count, 1000), TokenDataset(directory / "data")
    checkpoint = Checkpoint(resolve(TEACHER))
    plans = _plans(config, checkpoint, directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [type(checkpoint.shape).of(planned_config(checkpoint.shape, plan)) for plan in plans.values()]
    course = Course.of(config, checkpoint, dataset, fingerprint(directory / "data"), device, [count])
    course = course.within_memory(shapes, BATCH)
    source, validation = PreparedSource(dataset, 0, BATCH), dataset.split("validation")
    directory = directory / "state"
    directory.mkdir()
    progress = Progress("", 1, "")
    training = JointTraining(
        config, course, checkpoint, plans, source, validation, Journal(directory), directory, TaskErrors(config),
        progress,
    )  # fmt: skip
    for name in plans:
        training.join(name)
    together = list(training.present.values())
    teacher = Teacher(load_model(checkpoint.path, device=device, dtype=course.dtype))
    batch = Batch.read(source.batch(0), device)
    lesson = teacher.lesson(batch)
    alone = []
    for plan in plans.values():
        model = cut_in_memory(checkpoint, plan, device, torch.float32)
        alone.append(Trainer(model, course.training, course.steps, course.dtype))
    runs = {
        "search step": lambda: training.step(together, 0),
        "teacher forward": lambda: _lesson(teacher, batch),
        "student steps": lambda: [trainer.update([batch], [lesson], 0) for trainer in alone] and None,
    }
    found = interleaved(runs, rounds)
    floor = found["teacher forward"] + found["student steps"]
    print(f"one step of {count} candidates, {BATCH} sequences of {SEQ_LEN} tokens")
    for name, seconds in found.items():
        print(f"  {name:<40}{1000 * seconds:9.1f} ms")
    print(f"  {'search step / (teacher + student steps)':<40}{found['search step'] / floor:9.2f}")
    separate = count * found["teacher forward"] + found["student steps"]
    print(f"  {'a teacher forward for each student':<40}{separate / floor:9.2f}\n")


def _lesson(teacher: Teacher, batch: Batch) -> None:
    teacher.lesson(batch)


def _plans(config: SearchConfig, checkpoint: Checkpoint, directory: Path) -> dict[str, PrunePlan]:
    scores, words = load_scores(
        directory / "importance", checkpoint.shape, fingerprint(checkpoint.path), "auto", {1, 0}
    )
    return {
        each.name: make_plan(checkpoint.shape, scores, each.target, ranked_by=words)
        for each in spread(feasible(config, checkpoint.shape)[None], config.candidates)
    }


def compare_runs(directory: Path, count: int, steps: int) -> None:
    """A whole search against prune and distill for every candidate; asserts equal losses."""
    config = options(directory, count, steps)
    began = time.perf_counter()
    result = run_search(config)
    together = time.perf_counter() - began
    curves = json.loads((directory / "search" / "curves.json").read_text())
    plans = _plans(config, Checkpoint(resolve(TEACHER)), directory)
    began, worst = time.perf_counter(), 0.0
    for number, row in enumerate(result.candidates):
        plan, cut = directory / f"{number}.json", directory / f"{number}-cut"
        write_json(plan, plans[row["name"]].to_json())
        run_prune(PruneConfig(checkpoint=TEACHER, plan=plan, out=cut))
        out = directory / f"{number}-distilled"
        run_distill(
            DistillConfig(
                student=str(cut), teacher=TEACHER, data=config.data, steps=steps, batch_size=BATCH, lr=2e-3,
                eval_every=steps, eval_sequences=EVALUATED, out=out,
            )
        )  # fmt: skip
        worst = max(worst, _difference(curves[row["name"]], json.loads((out / "curve.json").read_text()), row))
    separate = time.perf_counter() - began
    assert worst < 1e-5, f"losses differ by {worst}"
    tokens = steps * BATCH * SEQ_LEN
    print(f"{count} candidates, {tokens:,} tokens each, from scores to losses")
    print(f"  {'one search':<40}{together:9.1f} s")
    print(f"  {'prune and distill, one by one':<40}{separate:9.1f} s{separate / together:8.2f} x")
    print(f"  {'largest difference of a loss':<40}{worst:9.1e}\n")


def _difference(searched: dict[str, Any], distilled: dict[str, Any], row: dict[str, Any]) -> float:
    """Of training losses at every step, and of the validation loss before training."""
    pairs = list(zip(searched["loss"], distilled["loss"], strict=True))
    pairs.append((row["loss_zero_shot"], distilled["validation"][0][1]))
    return max(abs(one - other) for one, other in pairs)


def zero_shot_parts(directory: Path, count: int) -> None:
    """Seconds of cutting, of building the stock model, of reading validation text; means over the candidates."""
    checkpoint, split = Checkpoint(resolve(TEACHER)), TokenDataset(directory / "data").split("validation")
    plans = _plans(options(directory, count, 1), checkpoint, directory)
    device, parts = torch.device("cpu"), [0.0, 0.0, 0.0]
    for plan in plans.values():
        times = [time.perf_counter()]
        tensors = {planned.name: read() for planned, read in cut_tensors(checkpoint, plan)}
        times.append(time.perf_counter())
        config = planned_config(checkpoint.shape, plan)
        model = model_from_tensors(config, tensors, device=device, dtype=torch.float32)
        times.append(time.perf_counter())
        with torch.inference_mode():
            evaluate_split(model, split, batch_size=BATCH, max_sequences=EVALUATED)
        times.append(time.perf_counter())
        parts = [total + after - before for total, before, after in zip(parts, times, times[1:], strict=False)]
    print(f"a zero-shot loss over {EVALUATED * SEQ_LEN:,} tokens, mean of {count} candidates")
    for name, seconds in zip(("cut the tensors", "build the stock model", "read the text"), parts, strict=True):
        print(f"  {name:<40}{1000 * seconds / len(plans):9.1f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    heading(f"Search cost: {settings.candidates} half-size candidates of {TEACHER}")
    set_quiet(True)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        prepare(directory)
        compare_steps(directory, settings.candidates, settings.rounds)
        zero_shot_parts(directory, settings.candidates)
        print()
        compare_runs(directory, settings.candidates, settings.steps)


if __name__ == "__main__":
    main()
