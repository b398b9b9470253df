"""What `minitron plan` and `distill --dry-run` estimate of one step, against what this machine measures.

Memory is the peak beyond an empty process that has imported everything, in a process per case; time is the median of a
few steps after the first.

python -m benchmarks.plan_check [--threads 1] [--steps 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402

from benchmarks.common import PeakMemory, heading  # noqa: E402
from benchmarks.distill_step import CASES, Setting, _batch, _trainer, engine  # noqa: E402
from minitron_cli.distill.memory import Case  # noqa: E402
from minitron_cli.distill.plan import product_speed, step_flops  # noqa: E402
from minitron_cli.shape import Shape  # noqa: E402


def case_of(setting: Setting) -> Case:
    """The same step as the estimate sees it."""
    student, teacher = (Shape.of(model.config.to_dict()) for model in (setting.student, setting.teacher))
    config = _trainer(setting, "kl", batch_size=setting.sequences).config
    return Case(student, teacher, config, setting.length, setting.device, setting.dtype)


def measure(name: str, steps: int) -> tuple[int, float]:
    """Peak bytes and seconds of a step."""
    setting = Setting("quickstart")  # imports, kernels and threads are there before anything is counted
    engine(setting)(setting.ids[:1, :8])
    _batch(setting.ids)
    peak = PeakMemory()
    setting = Setting(name)
    step, seconds = engine(setting), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step(setting.ids)
        seconds.append(time.perf_counter() - began)
    return peak.beyond(), sorted(seconds[1:])[steps // 2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(*measure(options.case, options.steps))
        return
    heading("Estimates of one step against measurements")
    print(f"{'':<14}{'memory, planned':>17}{'measured':>12}{'step, planned':>17}{'measured':>12}")
    for name in ("quickstart", "vocabulary"):
        command = [sys.executable, "-m", "benchmarks.plan_check", "--case", name]
        command += ["--threads", str(options.threads), "--steps", str(options.steps)]
        peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        case = case_of(Setting(name))
        planned = sum(case.memory(case.config.batch_size).values())
        foreseen = step_flops(case) / product_speed(case, case.config.batch_size)
        print(
            f"{name:<14}{planned / 1e6:14,.0f} MB{int(peak) / 1e6:9,.0f} MB{foreseen:15.2f} s{float(seconds):10.2f} s"
        )


if __name__ == "__main__":
    main()
