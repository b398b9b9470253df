"""Does the funnel find a good shape? All candidates distilled fully against the funnel's choice, paired by seed.

python -m benchmarks.search_quality [--seeds 3] [--steps 120] [--candidates 8]

Half-size cuts (non-embedding parameters) of the teacher that comes with the installation, on the standard library's
source, prepared as in the recipe `quickstart`. Every seed has its own data order. Fully: every candidate trains to the
last step. The funnel: three rungs, of which half the candidates leave each time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

from benchmarks.common import heading  # noqa: E402
from minitron_cli.config.data import DataConfig  # noqa: E402
from minitron_cli.config.importance import ImportanceConfig  # noqa: E402
from minitron_cli.config.search import SearchConfig  # noqa: E402
from minitron_cli.data.prepare import run_data  # noqa: E402
from minitron_cli.importance.stage import run_importance  # noqa: E402
from minitron_cli.runtime.progress import set_quiet  # noqa: E402
from minitron_cli.search.stage import run_search  # noqa: E402
from minitron_cli.search.tau import kendall_tau  # noqa: E402

TEACHER = "builtin:tiny-py"
RUNGS, BATCH, SEQ_LEN = 3, 4, 256


def search(directory: Path, seed: int, steps: int, count: int, rungs: int) -> dict[str, Any]:
    """One search over the same candidates."""
    config = SearchConfig(
        checkpoint=TEACHER, importance=directory / "importance", data=directory / "data", params_range="47%:50%",
        count="non-embedding", grid=("layers=4..6", "hidden=auto", "ffn=auto"), candidates=count, finalists=count,
        rungs=rungs, steps=steps, batch_size=BATCH, lr=2e-3, weight_decay=0.0, eval_every=steps >> (RUNGS - 1),
        eval_sequences=64, seed=seed, out=directory / f"search-{rungs}-{seed}",
    )  # fmt: skip
    return run_search(config).to_json()


def curves(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Validation losses by step of every candidate."""
    return {row["name"]: {point["step"]: point["loss"] for point in row["curve"]} for row in result["candidates"]}


def compare(full: dict[str, Any], funnel: dict[str, Any], steps: int) -> tuple[str, int]:
    """Print one seed; returns the funnel's choice and its rank among all that were distilled fully."""
    whole, halved = curves(full), curves(funnel)
    for name, points in halved.items():  # the funnel is the same training, stopped earlier
        assert all(abs(whole[name][step] - loss) < 1e-5 for step, loss in points.items()), name
    order = sorted(whole, key=lambda name: whole[name][steps])
    final = [whole[name][steps] for name in order]
    for place, name in enumerate(order, 1):
        rungs = "  ".join(f"{halved[name].get(rung['step'], float('nan')):.4f}" for rung in funnel["rungs"])
        print(f"  {place:>4}  {name:<26}{whole[name][0]:>9.4f}{whole[name][steps]:>9.4f}    {rungs}")
    agree = {"zero-shot": [whole[name][0] for name in order]}
    agree |= {f"step {rung['step']}": [whole[name][rung["step"]] for name in order] for rung in funnel["rungs"]}
    taus = ", ".join(f"{kendall_tau(values, final):+.2f} {name}" for name, values in agree.items())
    choice = funnel["chosen"]["name"]
    place = order.index(choice) + 1
    loss = whole[choice][steps]
    print(f"  Kendall's tau with the full order: {taus}")
    print(f"  funnel: {choice}, rank {place} of {len(order)}, {loss - final[0]:.4f} nats above the best\n")
    return choice, place


def main() -> None:
    """Search, then print losses, ranks and agreement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--candidates", type=int, default=8)
    options = parser.parse_args()
    steps, count = options.steps, options.candidates
    per_step = BATCH * SEQ_LEN
    seeds = options.seeds
    heading(f"Search quality: {count} half-size candidates, {steps} steps of {per_step:,} tokens, {seeds} seeds")
    set_quiet(True)
    began, places, totals = time.monotonic(), [], dict[str, list[float]]()
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        data = directory / "data"
        source = {"sources": ("python-stdlib",), "tokenizer": TEACHER, "seq_len": SEQ_LEN, "max_tokens": 1_000_000}
        run_data(DataConfig.from_mapping({**source, "out": data}))
        scored = directory / "importance"
        run_importance(ImportanceConfig(checkpoint=TEACHER, data=data, samples=128, loss_samples=16, out=scored))
        for seed in range(seeds):
            full, funnel = (search(directory, seed, steps, count, rungs) for rungs in (1, RUNGS))
            print(f"seed {seed}: rank, shape, loss before and after all {steps} steps; in the funnel's rungs")
            places.append(compare(full, funnel, steps)[1])
            for row in full["candidates"]:
                totals.setdefault(row["name"], []).append(row["loss_retrained"])
            print(f"  {time.monotonic() - began:.0f} s so far\n", flush=True)
    print("mean loss over the seeds [each]")
    for name, losses in sorted(totals.items(), key=lambda item: statistics.mean(item[1])):
        print(f"  {name:<26}{statistics.mean(losses):.4f}  [{', '.join(f'{loss:.4f}' for loss in losses)}]")
    quartile = max(1, count // 4)
    within = sum(place <= quartile for place in places)
    print(f"\nthe funnel's choice is among the best {quartile} of {count} in {within} of {len(places)} seeds")


if __name__ == "__main__":
    main()
