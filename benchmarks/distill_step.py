"""A distillation step against its floor, a dense implementation and other packages: tokens per second, extra memory.

The floor is the bare models: the teacher's forward pass, the student's forward and backward pass, and the products of
both heads; no loss, no clipping, no optimizer. All other rows are whole optimizer steps. Extra memory is the peak minus
weights, gradients, optimizer state and inputs, measured in a process per row; times are interleaved in one process.

On a GPU there is a third case, a student of 1.2B parameters with a teacher of 2.1B, and two more columns: the share of
the device's peak that the products reach, with and without torch.compile (a row that --compile adds on a CPU).

python -m benchmarks.distill_step [--case quickstart|vocabulary|billions] [--compile] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron_cli.runtime.threads import yield_while_waiting

yield_while_waiting()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.common import PeakMemory, heading, interleaved  # noqa: E402
from benchmarks.peers import PEERS, Loss  # noqa: E402
from minitron_cli.checkpoint.hub import resolve  # noqa: E402
from minitron_cli.checkpoint.reader import Checkpoint  # noqa: E402
from minitron_cli.config.distill import DistillConfig  # noqa: E402
from minitron_cli.distill.cache import Record  # noqa: E402
from minitron_cli.distill.losses import top_k  # noqa: E402
from minitron_cli.distill.trainer import Batch, Teacher, Trainer  # noqa: E402
from minitron_cli.forecast.devices import known_as  # noqa: E402
from minitron_cli.importance.weights import weight_norm_scores  # noqa: E402
from minitron_cli.models.head import backbone_output  # noqa: E402
from minitron_cli.models.load import load_model, new_model, own_memory  # noqa: E402
from minitron_cli.prune.plan import make_plan  # noqa: E402
from minitron_cli.search.measure import cut_in_memory  # noqa: E402

FLOOR, OURS, CACHED, DENSE = "bare models (floor)", "minitron", "minitron, cached teacher", "dense, F.kl_div"
COMPILED = "minitron, --compile"
WORDS = 24
"""Of the cached teacher, per token."""
LARGE = {
    "model_type": "llama", "vocab_size": 151_936, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}  # fmt: skip
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 4}
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_hidden_layers": 8}
BILLIONS = {**LARGE, "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 2048}
BILLIONS_TEACHER = {
    "hidden_size": 2560, "intermediate_size": 10_240, "num_attention_heads": 40, "num_hidden_layers": 19
}  # fmt: skip
BILLIONS_STUDENT = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16
}  # fmt: skip


def quickstart(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The built-in teacher, and a student of half its non-embedding parameters."""
    checkpoint = Checkpoint(resolve("builtin:tiny-py"))
    scores = weight_norm_scores(checkpoint)
    plan = make_plan(checkpoint.shape, scores, {"layers": 5, "ffn": 176}, ranked_by="weight norms")
    teacher = load_model(checkpoint.path, device=device, dtype=dtype)
    return teacher, cut_in_memory(checkpoint, plan, device, torch.float32)


def vocabulary(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Random models with 151,936 words, the teacher twice the student in every part."""
    teacher, student = (new_model({**LARGE, **sizes}, seed=0, dtype=torch.float32) for sizes in (TEACHER, STUDENT))
    for model in (teacher, student):
        own_memory(model)
    return teacher.to(device, dtype).eval(), student.to(device)


def billions(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Random models: 2.1B parameters teach 1.2B."""
    sizes = (BILLIONS_TEACHER, BILLIONS_STUDENT)
    teacher, student = (new_model({**BILLIONS, **each}, seed=0, dtype=torch.float32) for each in sizes)
    for model in (teacher, student):
        own_memory(model)
    return teacher.to(device, dtype).eval(), student.to(device)


CASES: dict[str, tuple[Callable[[torch.device, torch.dtype], tuple[Any, Any]], int, int]] = {
    "quickstart": (quickstart, 8, 256),
    "vocabulary": (vocabulary, 4, 256),
    "billions": (billions, 4, 2048),
}
"""Models, sequences, tokens of a sequence."""


class Setting:
    """Both models on the device, and the batch."""

    def __init__(self, case: str) -> None:
        make, self.sequences, self.length = CASES[case]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.teacher, self.student = make(self.device, self.dtype)
        self.teacher.requires_grad_(False)
        self.student.train()
        self.vocab = int(self.student.config.vocab_size)
        self.ids = self.batch(self.sequences, self.length)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    def batch(self, sequences: int, length: int) -> Tensor:
        """Random ids."""
        return torch.randint(0, self.vocab, (sequences, length), device=self.device)

    def autocast(self) -> torch.autocast:
        """What the step runs under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def flops(self, teacher: bool = True) -> float:
        """Of the products with weights: two per parameter and token forward, four backward."""

        def products(model: Any) -> int:
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            return int(sum(p.numel() for p in model.parameters() if p.ndim == 2)) - (
                0 if tied else model.get_input_embeddings().weight.numel()
            )

        return self.tokens * (6.0 * products(self.student) + (2.0 * products(self.teacher) if teacher else 0.0))


Step = Callable[[Tensor], None]
"""One step on ids (batch, seq)."""


def floor(setting: Setting) -> Step:
    """Hidden states forward and back with the gradient that the head's products give, 256 tokens at a time."""

    def step(ids: Tensor) -> None:
        setting.student.zero_grad(set_to_none=False)
        with setting.autocast():
            with torch.no_grad():
                theirs = backbone_output(setting.teacher, ids).last_hidden_state.flatten(0, 1)
            mine = backbone_output(setting.student, ids).last_hidden_state
            weight = setting.student.get_output_embeddings().weight
            other = setting.teacher.get_output_embeddings().weight
            gradient = torch.empty_like(mine).flatten(0, 1)
            with torch.no_grad():
                for rows, state in _chunks(mine.detach().flatten(0, 1)):
                    F.linear(theirs[rows], other)
                    logits = F.linear(state, weight)
                    gradient[rows] = torch.mm(logits, weight.to(logits.dtype))
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    if logits.dtype == weight.grad.dtype:
                        weight.grad.addmm_(logits.t(), state)
                    else:
                        weight.grad += torch.mm(logits.t(), state.to(logits.dtype))
        mine.backward(gradient.view_as(mine))

    return step


def _chunks(states: Tensor, most: int = 256) -> Any:
    for start in range(0, len(states), most):
        rows = slice(start, start + most)
        yield rows, states[rows]


def engine(setting: Setting) -> Step:
    """This package, live teacher."""
    teacher, trainer = Teacher(setting.teacher), _trainer(setting, "kl")

    def step(ids: Tensor) -> None:
        batch = _batch(ids)
        trainer.update([batch], [teacher.lesson(batch)], 0)

    return step


def compiled(setting: Setting) -> Step:
    """The same with the student's backbone compiled."""
    teacher, trainer = Teacher(setting.teacher), _trainer(setting, "kl", compile=True)

    def step(ids: Tensor) -> None:
        batch = _batch(ids)
        trainer.update([batch], [teacher.lesson(batch)], 0)

    return step


def cached(setting: Setting) -> Step:
    """This package, on stored answers; unpacking them is part of the step, reading a file is not."""
    trainer, record = _trainer(setting, f"topk:{WORDS}"), Record(setting.vocab, WORDS)
    teacher = Teacher(setting.teacher)
    stored: dict[torch.Size, Any] = {}

    def answers(ids: Tensor) -> Any:
        lesson = teacher.lesson(_batch(ids))
        with torch.no_grad():
            parts = [part for _, part in _chunks(lesson.hidden)]
            return np.concatenate([record.encode(top_k(lesson.head(part).log_softmax(-1), WORDS)) for part in parts])

    stored[setting.ids.shape] = answers(setting.ids)

    def step(ids: Tensor) -> None:
        if ids.shape not in stored:
            stored[ids.shape] = answers(ids)
        top = record.decode(stored[ids.shape])
        device = setting.device
        top = type(top)(top.ids.to(device), top.log_probs.to(device), top.log_tail.to(device), top.vocab)
        trainer.update([_batch(ids)], [top], 0)

    return step


def whole(loss: Loss) -> Callable[[Setting], Step]:
    """An ordinary training step around a loss."""

    def make(setting: Setting) -> Step:
        student = setting.student
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)

        def step(ids: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            with setting.autocast():
                value = loss(student, setting.teacher, ids)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()

        return step

    return make


def dense(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """As a user would write it with transformers."""
    with torch.no_grad():
        target = F.log_softmax(teacher(input_ids=ids).logits[:, :-1].float(), dim=-1)
    log_q = F.log_softmax(student(input_ids=ids).logits[:, :-1].float(), dim=-1)
    return F.kl_div(log_q.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)


def _trainer(setting: Setting, loss: str, **changes: Any) -> Trainer:
    options = {"student": "s", "teacher": "t", "data": Path("d"), "out": Path("o"), "steps": 1000, "lr": 1e-6}
    config = DistillConfig(**{**options, "loss": loss, **changes})
    return Trainer(setting.student, config, 1000, setting.dtype)


def _batch(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool, device=ids.device))


def rows(compile: bool) -> dict[str, Callable[[Setting], Step]]:
    """All that can be imported here."""
    found = {FLOOR: floor, OURS: engine, **({COMPILED: compiled} if compile else {}), CACHED: cached}
    found[DENSE] = whole(dense)
    for name, load in PEERS.items():
        try:
            found[name] = whole(load())
        except Exception as error:  # an optional package may fail to import in many ways
            print(f"{name}: not here ({_reason(error)})", file=sys.stderr)
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


def extra_bytes(make: Callable[[Setting], Step], setting: Setting) -> int:
    """Peak of one step above what is held after a step of a few tokens, which makes gradients and optimizer state."""
    step = make(setting)
    step(setting.batch(1, 8))
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(setting.ids)
        return torch.cuda.max_memory_allocated() - before
    peak = PeakMemory()
    step(setting.ids)
    return peak.beyond()


def _in_process(name: str, case: str, threads: int) -> int | None:
    """None where the row fails, which it says."""
    command = [sys.executable, "-m", "benchmarks.distill_step", "--memory-of", name, "--case", case, "--compile"]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: does not run here ({(done.stderr.strip().splitlines() or ['killed'])[-1][:120]})")
        return None
    return int(done.stdout.split()[-1])


def peak_rate(device: torch.device) -> tuple[float, str]:
    """bf16 operations per second of the device, and where the number is from."""
    known = known_as(torch.cuda.get_device_name(device))
    if known is not None and known.peak is not None:
        return known.peak, f"{known.name} data sheet"
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def product() -> None:
        torch.mm(a, a)
        torch.cuda.synchronize()

    return 2 * 8192**3 / interleaved({"": product}, 9)[""], "a measured product of 8,192 x 8,192"


def show(case: str, rounds: int, threads: int, compile: bool) -> None:
    """One case's table."""
    found = rows(compile)
    memory = {name: _in_process(name, case, threads) for name in found}
    setting = Setting(case)
    sizes = " and ".join(f"{sum(p.numel() for p in m.parameters()):,}" for m in (setting.teacher, setting.student))
    print(f"{case}: {setting.sequences} x {setting.length} tokens, vocabulary {setting.vocab:,}, {sizes} parameters")
    steps = {name: found[name](setting) for name, size in memory.items() if size is not None}

    def run(step: Step) -> None:
        step(setting.ids)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = interleaved({name: lambda step=step: run(step) for name, step in steps.items()}, rounds)  # type: ignore[misc]
    rate = peak_rate(setting.device) if setting.device.type == "cuda" else None
    print(f"{'':<28}{'ms':>9}{'tokens/s':>11}{'x floor':>9}{'extra memory':>14}{'  utilisation' if rate else ''}")
    for name, taken in seconds.items():
        line = f"{name:<28}{1000 * taken:9.1f}{setting.tokens / taken:11,.0f}{taken / seconds[FLOOR]:9.2f}"
        line += f"{(memory[name] or 0) / 1e6:11,.0f} MB"
        if rate:
            line += f"{setting.flops(teacher=name != CACHED) / taken / rate[0]:14.1%}"
        print(line)
    print(f"a cached teacher is {seconds[OURS] / seconds[CACHED]:.2f} x as fast as the live one")
    if rate:
        print(f"utilisation: of {rate[0] / 1e12:,.0f} TFLOP/s ({rate[1]}), products with weights only")
    print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", default=torch.cuda.is_available())
    parser.add_argument("--memory-of")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the packages compared with
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(extra_bytes(rows(True)[options.memory_of], Setting(options.case)))
        return
    heading("One distillation step")
    everywhere = [case for case in CASES if case != "billions" or torch.cuda.is_available()]
    for case in everywhere if options.case == "all" else [options.case]:
        show(case, options.rounds, options.threads, options.compile)


if __name__ == "__main__":
    main()
