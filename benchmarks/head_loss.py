"""Forward KL from hidden states to gradients: time and extra memory of the head and the loss alone.

Extra memory is the peak minus what is there before: hidden states, both heads and their allocated gradients. Each
implementation is measured alike, in a process of its own. Times are interleaved in one process.

python -m benchmarks.head_loss [--tokens 1024] [--hidden 1024] [--vocab 151936] [--rounds 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from benchmarks.common import heading, interleaved  # noqa: E402
from minitron_cli.config.objective import parse_objective  # noqa: E402
from minitron_cli.distill.fused import Lesson, head_loss  # noqa: E402
from minitron_cli.models.head import Head, backbone_output  # noqa: E402

FLOOR = "the four products (floor)"
DENSE = "dense, F.kl_div"


class Case:
    """Two models without blocks (head and embedding tied), final hidden states, allocated gradients."""

    def __init__(self, tokens: int, hidden: int, vocab: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1,
            tie_word_embeddings=True,
        )  # fmt: skip
        self.student, self.teacher = (AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.states, self.teacher_states = torch.randn(2, tokens, hidden).unbind()
        self.states.requires_grad_().grad = torch.ones_like(self.states)
        self.weight, self.teacher_weight = self.student.lm_head.weight, self.teacher.lm_head.weight
        self.weight.grad = torch.ones_like(self.weight)
        with torch.no_grad():
            self.outputs = [backbone_output(model, torch.zeros(1, 1).long()) for model in (self.student, self.teacher)]

    def floor(self) -> None:
        """What no exact implementation can leave out; its memory is that of the two dense logits."""
        with torch.no_grad():
            torch.mm(self.teacher_states, self.teacher_weight.t())
            logits = torch.mm(self.states, self.weight.t())
            torch.mm(logits, self.weight)
            self.weight.grad.addmm_(logits.t(), self.states)

    def dense(self) -> None:
        """As a user would write it."""
        with torch.no_grad():
            target = F.log_softmax(self.teacher.lm_head(self.teacher_states), dim=-1)
        log_q = F.log_softmax(self.student.lm_head(self.states), dim=-1)
        F.kl_div(log_q, target, reduction="batchmean", log_target=True).backward()

    def minitron(self) -> None:
        """This package."""
        lesson = Lesson(self.teacher_states, Head(self.teacher, self.outputs[1]))
        head = Head(self.student, self.outputs[0])
        result = head_loss(self.states, head, parse_objective("kl"), teacher=lesson, scale=1 / len(self.states))
        self.states.backward(result.gradient)


def trl() -> Callable[[Case], None]:
    """TRL's GKD loss at beta = 0, forward KL; dense."""
    from trl.experimental.gkd import GKDTrainer

    def run(case: Case) -> None:
        with torch.no_grad():
            target = case.teacher.lm_head(case.teacher_states)
        logits = case.student.lm_head(case.states)
        GKDTrainer.generalized_jsd_loss(logits, target, beta=0.0).backward()

    return run


def liger() -> Callable[[Case], None]:
    """Liger's chunked JSD loss at beta = 0, forward KL, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=128)

    def run(case: Case) -> None:
        targets = torch.zeros(len(case.states), dtype=torch.long)
        loss(case.states, case.weight, case.teacher_states, case.teacher_weight, targets).backward()

    return run


def implementations() -> dict[str, Callable[[Case], None]]:
    """All that can be imported here."""
    found: dict[str, Callable[[Case], None]] = {FLOOR: Case.floor, "minitron": Case.minitron, DENSE: Case.dense}
    for name, load in (("TRL, GKD loss", trl), ("Liger, chunked JSD loss", liger)):
        try:
            found[name] = load()
        except Exception as error:  # an optional package may fail to import in many ways
            print(f"{name}: not here ({type(error).__name__}: {str(error).splitlines()[0][:80]})", file=sys.stderr)
    return found


def extra_bytes(run: Callable[[Case], None], case: Case) -> int:
    """Peak resident memory of one call above what was resident before it."""
    run(Case(4, 8, 16))  # imports and thread pools
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run(case)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _in_process(name: str, sizes: list[int]) -> int:
    arguments = [str(size) for size in sizes]
    command = [sys.executable, "-m", "benchmarks.head_loss", "--memory-of", name, "--sizes", *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def largest_difference(run: Callable[[Case], None], case: Case, reference: Tensor) -> float:
    """Of the gradient of the hidden states, relative to the reference's largest entry."""
    assert case.states.grad is not None
    case.states.grad.zero_()
    run(case)
    return float((case.states.grad - reference).abs().max() / reference.abs().max())


def main() -> None:
    """Print seconds, the ratio to dense, extra memory, and how far gradients are from the dense ones."""
    parser = argparse.ArgumentParser()
    for name, size in (("tokens", 1024), ("hidden", 1024), ("vocab", 151936), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--memory-of")
    parser.add_argument("--sizes", type=int, nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(extra_bytes(implementations()[options.memory_of], Case(*options.sizes)))
        return
    sizes = [options.tokens, options.hidden, options.vocab]
    heading("Head and forward KL: {:,} tokens, hidden {:,}, vocabulary {:,}, fp32".format(*sizes))
    found = implementations()
    memory = {name: _in_process(name, sizes) for name in found if name != FLOOR}
    case = Case(*sizes)
    seconds = interleaved({name: lambda run=run: run(case) for name, run in found.items()}, options.rounds)  # type: ignore[misc]
    largest_difference(Case.dense, case, torch.ones(1))
    reference = case.states.grad.clone()
    print(f"{'':<28}{'seconds':>9}{'x dense':>9}{'extra memory':>14}{'gradient':>11}")
    for name, taken in seconds.items():
        line = f"{name:<28}{taken:9.2f}{taken / seconds[DENSE]:9.2f}"
        if name in memory:
            line += f"{memory[name] / 1e9:11.2f} GB{largest_difference(found[name], case, reference):11.0e}"
        print(line)


if __name__ == "__main__":
    main()
