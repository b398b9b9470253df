"""A training step: the learning rate at ends and joints, no dropout, recomputed activations, bf16, compiled blocks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.dropout import without_dropout
from minitron_cli.distill.schedule import learning_rate, warmup_steps
from minitron_cli.distill.trainer import Batch, Teacher, Trainer
from minitron_cli.errors import ConfigError

FP32 = torch.float32


def config(**changes: Any) -> DistillConfig:
    given = {"student": "s", "teacher": "t", "data": Path("d"), "out": Path("o"), "steps": 100, "lr": 1.0}
    return DistillConfig(**{**given, **changes})


def rates(steps: int, **changes: Any) -> list[float]:
    return [learning_rate(config(**changes), step, steps) for step in range(steps)]


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "halfway"), [("cosine", 0.55), ("linear", 0.55), ("wsd", 1.0), ("constant", 1.0)])
def test_ends_and_middle(schedule: str, halfway: float) -> None:
    found = rates(111, schedule=schedule, warmup=10, min_lr=0.1)
    assert found[:10] == pytest.approx([0.1 * number for number in range(1, 11)])
    assert found[9] == found[10] == 1.0
    assert found[60] == pytest.approx(halfway)
    assert found[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_shapes_differ_where_they_should() -> None:
    """A quarter of the way down, a line has lost a quarter and a cosine 15 %."""
    assert rates(101, schedule="linear", warmup=0, min_lr=0.0)[25] == pytest.approx(0.75)
    assert rates(101, schedule="cosine", warmup=0, min_lr=0.0)[25] == pytest.approx(0.5 + 0.25 * 2**0.5)


def test_wsd_decays_in_its_share_of_the_steps() -> None:
    found = rates(100, schedule="wsd", warmup=0.1, decay=0.2, min_lr=0.0)
    assert found[9:80] == [1.0] * 71
    assert found[80:] == pytest.approx([1 - number / 20 for number in range(1, 21)])
    assert rates(10, schedule="wsd", warmup=0, decay=0.01, min_lr=0.0) == [1.0] * 9 + [0.0]


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert [warmup_steps(value, 1000) for value in (0, 0.0001, 0.05, 1, 40)] == [0, 1, 50, 1, 40]
    with pytest.raises(ConfigError, match="neither a share below 1 nor a whole number"):
        config(warmup=1.5)


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]), st.integers(1, 60),
    st.sampled_from([0, 0.05, 0.5, 0.99, 1, 7, 100]), st.floats(0, 1), st.floats(0.01, 1),
)  # fmt: skip
def test_every_rate_is_between_0_and_the_peak(
    schedule: str, steps: int, warmup: float, least: float, decay: float
) -> None:
    """Rising, then never rising again."""
    found = rates(steps, schedule=schedule, warmup=warmup, min_lr=least, decay=decay)
    assert all(0 <= rate <= 1 + 1e-12 for rate in found)
    after = found[max(0, warmup_steps(warmup, steps) - 1) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


# --- steps ------------------------------------------------------------------------------------------------------------


def model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    values = {**TINY[family], **changes}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=FP32)


def batch(rows: int = 4, length: int = 16) -> Batch:
    ids = torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones(rows, length - 1, dtype=torch.bool))


def weights(trained: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


def trained(
    student: Any, steps: int = 2, dtype: torch.dtype = FP32, **options: Any
) -> tuple[torch.Tensor, list[float]]:
    """Weights and losses after some steps on one batch."""
    teacher = Teacher(model(seed=7))
    trainer = Trainer(student, config(lr=1e-3, **options), steps, dtype)
    losses = [trainer.update([batch()], [teacher.lesson(batch())], step).loss for step in range(steps)]
    return weights(student), losses


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5}),
        ("phimoe", {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5}),
    ],
)
def test_no_dropout_is_left(family: str, rates: dict[str, float]) -> None:
    """Training mode gives what evaluation mode gives; and it did not before."""
    random = model(family, **rates).train()
    ids = batch().ids
    assert not torch.equal(random(ids).logits, random(ids).logits)
    quiet = without_dropout(random).train()
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)
    torch.testing.assert_close(quiet(ids).logits, random.eval()(ids).logits)


def test_recomputed_activations_give_the_same_weights() -> None:
    kept, losses = trained(model())
    again, same = trained(model(), checkpoint_activations=True)
    assert same == losses and torch.equal(kept, again)


def test_activations_are_recomputed() -> None:
    """Blocks run twice per step."""
    calls = []
    student = model()
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trained(student, steps=1, checkpoint_activations=True)
    assert len(calls) == 2


def test_micro_batches_weigh_tokens_not_sequences() -> None:
    """Parts with different numbers of targets, one with none: gradients of the whole batch."""
    whole = batch()
    masked = whole.targets.clone()
    masked[0] = False
    masked[1, 3:] = False
    whole = Batch(whole.ids, masked)
    parts = [Batch(whole.ids[rows], masked[rows]) for rows in (slice(0, 1), slice(1, 2), slice(2, 4))]
    teacher, found = Teacher(model(seed=7)), []
    for batches in ([whole], parts):
        student = model()
        trainer = Trainer(student, config(lr=1e-3), 1, FP32)
        found.append((trainer.update(batches, map(teacher.lesson, batches), 0), weights(student)))
    (one, first), (other, second) = found
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.terms["kl"] == pytest.approx(one.loss)
    assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)


def test_lessons_are_asked_for_one_by_one() -> None:
    """The teacher's hidden states of one micro-batch exist at a time."""
    teacher, student = Teacher(model(seed=7)), model()
    order: list[str] = []
    student.model.embed_tokens.register_forward_hook(lambda *_: order.append("student"))

    def lesson(part: Batch) -> Any:
        order.append("teacher")
        return teacher.lesson(part)

    Trainer(student, config(), 1, FP32).update([batch(), batch()], map(lesson, [batch(), batch()]), 0)
    assert order == ["teacher", "student"] * 2


def test_a_batch_without_targets_is_no_division_by_zero() -> None:
    empty = Batch(batch().ids, torch.zeros(4, 15, dtype=torch.bool))
    update = Trainer(model(), config(loss="ce"), 1, FP32).update([empty], [], 0)
    assert update.loss == 0.0 and update.gradient_norm == 0.0


def test_bf16_keeps_fp32_weights_and_follows_fp32() -> None:
    exact, losses = trained(model(), steps=4)
    student = model()
    rounded, found = trained(student, steps=4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in student.parameters()} == {FP32}
    assert found == pytest.approx(losses, rel=0.05) and found != losses
    start = weights(model())
    moved, other = exact - start, rounded - start
    assert torch.cosine_similarity(moved, other, dim=0) > 0.9
    assert (rounded != rounded.bfloat16()).float().mean() > 0.9, "updates smaller than a bf16 digit are kept"


def test_optimizer_state_of_a_bf16_run_is_fp32_and_restores() -> None:
    student = model()
    trainer = Trainer(student, config(lr=1e-3, loss="ce"), 4, torch.bfloat16)
    trainer.update([batch()], [], 0)
    saved = {name: tensor.detach().clone() for name, tensor in trainer.tensors().items()}
    assert {tensor.dtype for tensor in saved.values()} == {FP32}
    trainer.update([batch()], [], 1)
    other = Trainer(model(seed=3), config(lr=1e-3, loss="ce"), 4, torch.bfloat16)
    other.restore(saved)
    other.update([batch()], [], 1)
    assert torch.equal(weights(student), weights(other.model))


def test_compiled_blocks_leave_the_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone runs as torch.compile traces it (without generating code here); the head is the stock one."""
    plain, losses = trained(model())
    real, traced = torch.compile, []

    def through_the_tracer(module: Any) -> Any:
        traced.append(module)
        return real(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", through_the_tracer)
    student = model()
    compiled, found = trained(student, compile=True)
    assert traced == [student.model]
    assert found == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
