"""What test_distributed.py has two processes do: everything is compared with one process's work, done in each of them.

A script, so that one start of torchrun serves all checks. Each check is printed by process 0 when it has passed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_align import make_place
from helpers_align import options as align_options
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from minitron_cli.align.stage import run_align
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.intermediate import Matching
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.trainer import Batch, Teacher, Trainer
from minitron_cli.errors import RunError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.models.load import load_model
from minitron_cli.models.save import save_model
from minitron_cli.models.shard import Sharding
from minitron_cli.models.split import is_split, part_of, whole
from minitron_cli.runtime.group import Group, process_group
from minitron_cli.search.stage import run_search
from minitron_cli.tokens import Sequences, TokenDataset

CPU = torch.device("cpu")
STATES = {"states": ("embeddings", "blocks", "mlp_inputs", "attention"), "layers_map": "last-1:last-1"}
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"parts": 1},
    "gemma2": {"config": {"checkpoint_activations": True}},
    "gpt2": {"offload": True},
    "opt-post_norm": {"keep_gathered": True, "config": {"loss": "0.9*kl+0.1*ce", "temperature": 2.0}},
    "mixtral": {},
    "phi": {"config": {"loss": "0.5*rkl+0.5*mse"}},
    "untied-states": {"config": STATES, "micro": 3},
    "untied-states-parts": {"config": STATES, "micro": 1},
    "tied-bf16": {"dtype": torch.bfloat16, "tolerance": 2e-2},
}
"""By the name of a student's directory and what is special: how it is spread, and options."""
ALIGNED: dict[str, dict[str, Any]] = {"bond": {}, "jbond": {"method": "jbond", "gamma": 0.5}}
"""Methods, the second with an anchor that moves."""
CACHED: dict[str, Any] = {"steps": 3, "batch_size": 4, "shard": "both"}
SEQUENCES, STEPS = 6, 3
STEPS_OF_RUN = 10


def config_of(root: Path, **changes: Any) -> DistillConfig:
    values: dict[str, Any] = {
        "student": "s", "teacher": "t", "data": root / "data", "out": root / "o", "steps": 10, "lr": 1e-3
    }  # fmt: skip
    return DistillConfig(**values | changes)


def sequences(vocab: int) -> Sequences:
    """Random ids; one sequence has no target, and others have few, so that processes differ in what they count."""
    generator = np.random.default_rng(0)
    targets = generator.random((SEQUENCES, 12)) < 0.7
    targets[1], targets[3, 2:] = False, False
    return Sequences(generator.integers(3, vocab, (SEQUENCES, 12)), targets)


def train(trainer: Trainer, teacher: Teacher, batch: Sequences, micro: int) -> list[Any]:
    """What some steps report."""
    found = []
    for step in range(STEPS):
        parts = [Batch.read(batch[start : start + micro], CPU) for start in range(0, len(batch), micro)]
        found.append(trainer.update(parts, (teacher.lesson(part) for part in parts), step))
    return found


def make(
    root: Path, student: Checkpoint, models: tuple[Any, Any], config: DistillConfig, dtype: torch.dtype, group: Group
) -> tuple[Trainer, Teacher]:
    model, other = models
    matching = Matching.of(config, Checkpoint(root / "teacher").shape, student.shape) if config.states else None
    teacher = Teacher(other, matching.teacher_listener(other)) if matching else Teacher(other)
    losses = matching.loss(model) if matching else None
    return Trainer(model, config, 10, dtype, losses, group), teacher


def check_training(root: Path, name: str, group: Group) -> None:
    """Losses, terms, norms and weights of a few steps; parameters are DTensors."""
    case, config = CASES[name], config_of(root, **CASES[name].get("config", {}))
    known = name.removesuffix("-parts").removesuffix("-states").removesuffix("-bf16")
    student = Checkpoint(root / known)
    dtype, tolerance, micro = case.get("dtype", torch.float32), case.get("tolerance", 1e-5), case.get("micro", 3)
    batch = sequences(student.shape["vocab"])
    # A family's own teacher: another checkpoint of the same words, whole in each process or in parts.
    place = root / "teacher" if known in ("tied", "untied") else root / known
    teacher = Sharding(group, CPU, 2, dtype).load(Checkpoint(place), trained=False)
    assert all(is_split(parameter) for parameter in teacher.parameters())
    spread = Sharding(
        group, CPU, case.get("parts", 2), dtype, case.get("keep_gathered", False), case.get("offload", False)
    )
    split = spread.load(student, trained=True)
    trainer, taught = make(root, student, (split, teacher), config, dtype, group)
    for parameter_name, parameter in split.named_parameters():
        assert isinstance(parameter, DTensor), parameter_name
        assert parameter.dtype == torch.float32
        held = part_of(parameter).numel()
        whole_here = spread.parts == 1 or len(parameter) < spread.parts  # a single row cannot be parted
        assert whole_here or held < parameter.numel(), parameter_name
    plain = load_model(student.path, device=CPU, dtype=torch.float32)
    single, known_taught = make(
        root, student, (plain, load_model(place, device=CPU, dtype=dtype)), config, dtype, Group()
    )
    if place == student.path:  # a student that differs from its teacher, alike in both
        for model in (split, plain):
            with torch.no_grad():
                for parameter in model.parameters():
                    part_of(parameter).mul_(1.1)
    expected = train(single, known_taught, batch, SEQUENCES if micro == 3 else 2 * micro)
    found = train(trainer, taught, batch[group.part], micro)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=tolerance, abs=tolerance)
        assert mine.gradient_norm == pytest.approx(
            theirs.gradient_norm, rel=(100 if mine is not found[0] else 1) * tolerance
        )
        assert mine.terms == pytest.approx(theirs.terms, rel=10 * tolerance, abs=tolerance)
    if dtype == torch.float32:
        for (parameter_name, mine), theirs in zip(split.named_parameters(), plain.parameters(), strict=True):
            # The gradient of a bias of keys is zero but for rounding, which AdamW makes steps of.
            assert parameter_name.endswith("bias") or torch.allclose(whole(mine), theirs, atol=1e-4), parameter_name


def check_saving(root: Path, group: Group) -> None:
    """Parts of two processes into one, a whole file into parts, and the export: all the same numbers."""
    student = Checkpoint(root / "untied")
    config, batch = config_of(root), sequences(student.shape["vocab"])
    split = Sharding(group, CPU, 2, torch.float32).load(student, trained=True)
    teacher = Teacher(load_model(root / "teacher", device=CPU, dtype=torch.float32))
    trainer = Trainer(split, config, 10, torch.float32, None, group)
    train(trainer, teacher, batch[group.part], 3)
    both = Checkpoints(root / "states", 1, group=group)
    both.directory.mkdir(exist_ok=True)
    both.save(3, trainer.tensors(), {"step": 3})
    group.wait()
    one = Trainer(load_model(student.path, device=CPU, dtype=torch.float32), config, 10, torch.float32)
    saved, values = Checkpoints(root / "states", 1).newest() or ({}, {})
    assert values == {"step": 3}
    one.restore(saved)
    expected = {name: whole(tensor) for name, tensor in trainer.tensors().items()}
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, expected[name]), name
    if group.main:
        Checkpoints(root / "states", 1).save(4, one.tensors(), {"step": 4})
    group.wait()
    again = Trainer(
        Sharding(group, CPU, 1, torch.float32).load(student, trained=True), config, 10, torch.float32, None, group
    )
    saved, values = both.newest() or ({}, {})
    assert values == {"step": 4}
    again.restore(saved)
    for name, tensor in again.tensors().items():
        assert torch.equal(whole(tensor), expected[name]), name
    out = root / "export"
    out.mkdir(exist_ok=True)
    save_model(split, student, out, group)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, expected[f"weight.{name}"]), name
    experts = Checkpoint(root / "mixtral")  # names on disk are not those in memory
    out = root / "export-mixtral"
    out.mkdir(exist_ok=True)
    save_model(Sharding(group, CPU, 2, torch.float32).load(experts, trained=True), experts, out, group)
    for mine, theirs in ((root / "export", student.path), (out, experts.path)):
        with safe_open(mine / "model.safetensors", "pt") as file, safe_open(theirs / "model.safetensors", "pt") as old:
            assert set(file.keys()) == set(old.keys())
            if mine == out:
                assert all(torch.equal(file.get_tensor(name), old.get_tensor(name)) for name in old.keys())  # noqa: SIM118


def check_damage(root: Path, group: Group) -> None:
    """A damaged part makes every process go back to the checkpoint before it."""
    place = Checkpoints(root / "damaged", 2, group=group)
    place.directory.mkdir(exist_ok=True)
    tensors = {"a": torch.arange(1000.0)}
    for step in (1, 2):
        place.save(step, tensors, {"step": step})
    group.wait()
    if group.main:
        file = next(place.path(2).glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    group.wait()
    _, values = place.newest() or ({}, {})
    assert values == {"step": 1} and place.found() == [place.path(1)]


def check_evaluation(root: Path, group: Group) -> None:
    """Batches that two processes cannot share evenly."""
    split = TokenDataset(root / "data").split("validation")
    model = load_model(root / "untied", device=CPU, dtype=torch.float32)
    expected = evaluate_split(model, split, batch_size=3, max_sequences=7)
    parts = Sharding(group, CPU, 2, torch.float32).load(Checkpoint(root / "untied"), trained=True)
    found = evaluate_split(parts, split, batch_size=3, max_sequences=7, group=group)
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-6)


def check_nan(root: Path, group: Group) -> None:
    """What one process finds stops both, with the step and its batch on disk."""
    config = config_of(
        root, student=str(root / "untied"), teacher=str(root / "teacher"), out=root / "nan", steps=4, batch_size=4,
        save_every=1, shard="both",
    )  # fmt: skip
    lesson, asked = Teacher.lesson, []

    def poisoned(self: Teacher, batch: Batch) -> Any:
        asked.append(1)
        found = lesson(self, batch)
        return replace(found, hidden=found.hidden * float("nan")) if len(asked) == 3 and group.rank == 1 else found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="at step 3"):
        patch.setattr(Teacher, "lesson", poisoned)
        run_distill(config)
    group.wait()
    partial = root / "nan.partial"
    assert (partial / "not-finite.step-3.safetensors").exists() and (partial / "state.step-000000002").is_dir()
    group.wait()
    assert run_distill(config).steps == 4


def check_cached(root: Path, group: Group) -> None:
    """A cache that one process writes and both read."""
    run_distill(
        config_of(
            root,
            **CACHED,
            student=str(root / "untied"),
            teacher=str(root / "teacher"),
            cache_teacher=root / "cache",
            out=root / "cached",
        )
    )


def run_options(root: Path, out: Path) -> dict[str, Any]:
    """A run that is killed and resumed; its batch can be shared by one, two or three processes."""
    return {
        "student": str(root / "untied"), "teacher": str(root / "teacher"), "data": root / "data", "out": out,
        "steps": STEPS_OF_RUN, "batch_size": 6, "save_every": 4, "eval_every": 4, "shard": "both",
    }  # fmt: skip


def check_runs(root: Path, group: Group) -> None:
    """What a killed run left goes on, and one starts that nobody disturbs; test_distributed.py compares them."""
    for name in ("on-2", "two"):
        assert run_distill(DistillConfig(**run_options(root, root / name))).steps == STEPS_OF_RUN
        group.wait()


def search_options(root: Path, out: Path) -> dict[str, Any]:
    """A search with two rungs; the first leaves one of three out."""
    return {
        "checkpoint": str(root / "tied"), "teacher": str(root / "teacher"), "importance": root / "scores",
        "data": root / "data", "params": "88%", "tolerance": "9%", "grid": ("ffn=24,32,40",), "finalists": 3,
        "steps": 4, "rungs": 2, "batch_size": 4, "eval_sequences": 5, "lr": 1e-3, "shard": "both", "out": out,
    }  # fmt: skip


def check_search(root: Path, group: Group) -> None:
    """Candidates in parts; test_distributed.py compares."""
    run_search(SearchConfig(**search_options(root, root / "searched")))


def check_align(root: Path, group: Group) -> None:
    """Prompts shared; test_distributed.py compares."""
    for name, changes in ALIGNED.items():
        run_align(align_options({**make_place(root / "align", make=False), **changes}, root / f"{name}-two"))


def main(root: Path, checks: Iterable[str]) -> None:
    with process_group() as group:
        assert group.size == 2
        for name in checks:
            kind, _, case = name.partition(":")
            if case:
                check_training(root, case, group)
            else:
                globals()[f"check_{kind}"](root, group)
            if group.main:
                print("passed", name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
