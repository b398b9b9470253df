"""Reward against KL of BOND, J-BOND and REINFORCE, beside best-of-N sampling: `python -m benchmarks.align_pareto`.

The policy is the distilled student of a run of `recipes/align-quickstart.yaml` (`--run DIR`, made first where it is not
there), the reward and the prompts are those of the recipe. Each method trains with its own seed of samples; the curve
is what it measures on the way. BOND's last model is then measured on its own: single samples of it and best-of-4 of the
policy as it was, at least `--samples` each, on prompts that training left out; intervals are 95 % over prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import heading  # noqa: E402
from minitron_cli.align.lessons import Writer, stop_tokens  # noqa: E402
from minitron_cli.align.measure import mean_and_error  # noqa: E402
from minitron_cli.align.policy import Cast, PolicyLearner  # noqa: E402
from minitron_cli.align.prompts import PromptReader  # noqa: E402
from minitron_cli.align.reward_models import open_reward  # noqa: E402
from minitron_cli.align.sampling import Sampler  # noqa: E402
from minitron_cli.align.stage import AlignResult, run_align  # noqa: E402
from minitron_cli.config.align import AlignConfig  # noqa: E402
from minitron_cli.config.recipe import load_recipe  # noqa: E402
from minitron_cli.config.run import RunConfig  # noqa: E402
from minitron_cli.drawing.frame import frame  # noqa: E402
from minitron_cli.drawing.svg import chart, el, join, marker, polyline, text  # noqa: E402
from minitron_cli.models.load import load_model  # noqa: E402
from minitron_cli.models.tokenizer import load_tokenizer  # noqa: E402
from minitron_cli.runtime.progress import set_quiet  # noqa: E402
from minitron_cli.stages import run_recipe  # noqa: E402

RECIPE = "align-quickstart"
METHODS: dict[str, dict[str, Any]] = {
    "BOND": {},
    "J-BOND": {"method": "jbond", "beta": 0.5, "eta": 0.05, "gamma": 0.0, "policy_samples": 4},
    "REINFORCE": {"method": "reinforce", "kl_weight": 0.3, "policy_samples": 8},
}
"""What differs from the recipe's section. Samples per prompt and step are nine, six and eight."""
TARGET, BUDGET = 4, 1.5
COLOURS = {"best-of-N": "#3d444d", "BOND": "#0072b2", "J-BOND": "#c85200", "REINFORCE": "#00825f"}
MARKS = {"best-of-N": "circle", "BOND": "square", "J-BOND": "triangle", "REINFORCE": "circle"}
CPU = torch.device("cpu")
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Final:
    """Means with half their 95 % intervals over prompts: the reward of one sample, of best-of-4 before, the difference
    of both, and the KL; `samples` of each of the first two.
    """

    single: tuple[float, float]
    best: tuple[float, float]
    difference: tuple[float, float]
    kl: tuple[float, float]
    samples: int


def settings(run: Path, out: Path, **changes: Any) -> AlignConfig:
    """The recipe's section on the student and data of a run."""
    section = load_recipe(RECIPE).align or {}
    wired = {"policy": str(run / "student"), "prompts": run / "data", "out": out, "device": "cpu"}
    return AlignConfig(**{**section, **wired, **changes})


def measured(config: AlignConfig, aligned: Path, samples: int) -> Final:
    """The final comparison, on random numbers that training did not see."""
    tokenizer = load_tokenizer(config.policy)
    before, after = (load_model(path, device=CPU, dtype=torch.float32) for path in (config.policy, aligned))
    words = int(before.config.vocab_size)
    stops = stop_tokens(tokenizer, before, config.stop_text, words)
    sampler = Sampler(stops, words, config.max_new_tokens, config.sample_batch)
    writer = Writer(sampler, tokenizer, config.stop_text, open_reward(config, CPU, torch.float32))
    prompts = PromptReader(tokenizer, config.policy, None, config.prompt_tokens).read(config.prompts, "validation")
    each = -(-samples // len(prompts))
    responses = writer.write(after, prompts, each, 1_000_003)
    single = writer.rewards(prompts, writer.texts(responses))
    groups = writer.rewards(prompts, writer.texts(writer.write(before, prompts, each * TARGET, 1_000_033)))
    best = groups.view(len(prompts), each, TARGET).amax(-1)  # as many independent draws of best-of-4 as single samples
    cast = Cast(PolicyLearner(after, config, 1, torch.float32), before, before, words, config.micro_batch)
    ratio = (cast.likelihoods(after, responses) - cast.likelihoods(before, responses)).double().view(len(prompts), -1)
    difference = single.mean(-1, keepdim=True) - best.mean(-1, keepdim=True)
    return Final(
        mean_and_error(single), mean_and_error(best), mean_and_error(difference), mean_and_error(ratio), single.numel()
    )


def picture(series: Mapping[str, Points], width: int = 880) -> str:
    """Reward against KL as an SVG of its own."""
    box = (56.0, 34.0, width - 130.0, 356.0)
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    axes = frame(box, xs, ys, ("KL to the policy as it was, nats per sequence", "mean reward"))
    rules = [".grid{stroke:#d9dee3}.axis{stroke:#59636e}text{font:12px system-ui,sans-serif;fill:#59636e}"]
    parts = [axes.grid]
    for name, points in series.items():
        key = name.replace(" ", "-")
        rules.append(f".{key}{{stroke:{COLOURS[name]};fill:none;stroke-width:2}}.dot-{key}{{fill:{COLOURS[name]}}}")
        drawn = [(axes.x(x), axes.y(y)) for x, y in sorted(points)]
        parts.append(polyline(drawn, key))
        parts += [marker(MARKS[name], x, y, f"dot-{key}") for x, y in drawn]
        parts.append(text(drawn[-1][0] + 8, drawn[-1][1] + 4, name))
    label = "Mean reward against KL: " + ", ".join(series)
    drawing = chart(width, 400, label, [el("style", rules and "".join(rules)), join(parts)])
    return str(drawing).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def show(name: str, result: AlignResult, curve: Mapping[str, Any]) -> Points:
    """Print one method's curve; returns its points."""
    print(
        f"{name}: {result.steps} steps in {result.seconds:.0f} s"
        + (f", stopped: {result.stopped}" if result.stopped else "")
    )
    for each in curve["measurements"]:
        print(
            f"  step {each['step']:>4}  reward {each['reward']:.4f} ± {each['reward_error']:.4f}  "
            f"KL {each['kl']:.3f} ± {each['kl_error']:.3f}  wins {100 * each['win_rate']:.1f} %"
        )
    return [(each["kl"], each["reward"]) for each in curve["measurements"]]


def main() -> None:
    """Train, print the curves and the final comparison, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs") / RECIPE, help="directory of the recipe's run")
    parser.add_argument("--methods", default=",".join(METHODS), help="which to train")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--samples", type=int, default=8000, help="samples of each in the final comparison")
    parser.add_argument("--figure", type=Path, default=Path("align_pareto.svg"))
    options = parser.parse_args()
    set_quiet(True)
    if not (options.run / "student").is_dir():
        run_recipe(RunConfig(recipe=RECIPE, out=options.run))
    heading(f"Alignment of {options.run / 'student'}")
    steps = {"steps": options.steps} if options.steps else {}
    series: dict[str, Points] = {}
    with TemporaryDirectory() as folder:
        for name in options.methods.split(","):
            out = Path(folder) / name
            config = settings(options.run, out, **METHODS[name], **steps)
            result = run_align(config)
            points = show(name, result, json.loads((out / "curve.json").read_text()))
            if not series:
                series["best-of-N"] = [(each["kl"], each["reward"]) for each in result.best_of]
                shown = ", ".join(f"{each['n']}: {each['reward']:.4f}" for each in result.best_of)
                print(f"  best of N of the policy as it was: {shown}")
            series[name] = points
            if name == "BOND":
                began = time.monotonic()
                final = measured(config, out, options.samples)
                told = "yes" if final.difference[0] >= final.difference[1] and final.kl[0] <= BUDGET else "no"
                means = (final.single, final.best, final.difference, final.kl)
                single, best, gap, kl = (f"{mean:.4f} ± {error:.4f}" for mean, error in means)
                print(f"  final, {final.samples} samples each: one sample {single}, best of {TARGET} before {best}")
                print(f"  difference {gap}, KL {kl} ({time.monotonic() - began:.0f} s)")
                print(f"  at least best of {TARGET}, at no more than {BUDGET} nats: {told}")
    options.figure.write_text(picture(series), "utf-8")
    print(f"\n{options.figure}: reward against KL")


if __name__ == "__main__":
    main()
