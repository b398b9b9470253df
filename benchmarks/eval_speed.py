"""MMLU through `minitron eval`'s model class and through lm-evaluation-harness's own, question by question.

python -m benchmarks.eval_speed CKPT --data-dir DIR [--limit N] [--batch-size 8]

Both run the same task objects on the same loaded model in one process, task after task in turns. It prints the ratio of
the times, and stops with an error where a prediction differs whose two best choices are not a rounding error apart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from benchmarks.common import heading  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.evaluate.adapters import LanguageModel  # noqa: E402
from minitron_cli.evaluate.harness import build_tasks, find_local  # noqa: E402
from minitron_cli.evaluate.quiet import quiet_harness, seed_harness  # noqa: E402
from minitron_cli.models.load import load_model  # noqa: E402
from minitron_cli.models.tokenizer import load_tokenizer  # noqa: E402
from minitron_cli.runtime.device import pick_device, pick_dtype  # noqa: E402
from minitron_cli.runtime.progress import Progress, set_quiet  # noqa: E402

CLOSE = 1e-3
"""Nats between two choices that the order of sums may decide."""


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    heading(f"MMLU of {Path(options.checkpoint).name}, batch size {options.batch_size}")
    device = pick_device("auto")
    path = resolve(options.checkpoint)
    model = load_model(path, device=device, dtype=pick_dtype("auto", device))
    tokenizer = load_tokenizer(str(path))
    tasks = build_tasks(["mmlu"], num_fewshot=None, local=find_local(["mmlu"], options.data_dir))
    totals, questions, differing = {"minitron": 0.0, "lm-evaluation-harness": 0.0}, 0, 0
    with quiet_harness(), Progress("mmlu, twice", len(tasks.leaves), "subjects") as progress:
        set_quiet(True)
        models = {
            "minitron": LanguageModel(model, tokenizer, batch_size=options.batch_size, answered=lambda done, of: None),
            "lm-evaluation-harness": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        }
        for number, (name, task) in enumerate(tasks.leaves.items()):
            found: dict[str, list[list[float]]] = {}
            order = list(models) if number % 2 else list(reversed(models))
            for which in order:
                began = time.perf_counter()
                found[which] = _answers(models[which], name, task, options.limit)
                totals[which] += time.perf_counter() - began
            ours, theirs = found["minitron"], found["lm-evaluation-harness"]
            questions += len(ours)
            differing += sum(_differs(one, other) for one, other in zip(ours, theirs, strict=True))
            progress.advance()
    for which, seconds in totals.items():
        print(f"{which:<24}{seconds:9.1f} s{questions / seconds:10.1f} questions/s")
    ratio = totals["minitron"] / totals["lm-evaluation-harness"]
    print(f"ratio {ratio:.2f}; {questions:,} questions, {differing} predictions differ")
    if differing:
        raise SystemExit("predictions differ beyond rounding")


def _answers(lm: Any, name: str, task: Any, limit: int | None) -> list[list[float]]:
    """Log-probabilities of the four choices of each question, in order."""
    seed_harness()
    task._instances = None
    result = evaluate(
        lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, log_samples=True, bootstrap_iters=0
    )
    rows = sorted(result["samples"][name], key=lambda row: row["doc_id"])
    return [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]


def _differs(ours: list[float], theirs: list[float]) -> bool:
    one, other = torch.tensor(ours), torch.tensor(theirs)
    if one.argmax() == other.argmax():
        return False
    best = theirs[int(other.argmax())]
    return best - theirs[int(one.argmax())] > CLOSE


if __name__ == "__main__":
    main()
