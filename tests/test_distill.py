"""The distill stage: it learns, it is honest about what it wrote, it refuses what cannot work."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from helpers_chain import SMALL, make_checkpoint, make_data
from helpers_tokenizer import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.schedule import learning_rate
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.trainer import Batch, Trainer
from minitron_cli.errors import InputError, ResourceError, RunError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.models.load import load_model
from minitron_cli.runtime import memory
from minitron_cli.tokens import TokenDataset


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Any]:
    checkpoint = make_checkpoint(tmp_path / "teacher")
    data = make_data(tmp_path / "data", checkpoint)
    return {"student": str(checkpoint), "teacher": str(checkpoint), "data": data, "out": tmp_path / "out"}


def test_distilling_from_itself_starts_at_zero_and_stays_there(chain: dict[str, Any]) -> None:
    """Identity: a student equal to its teacher has KL 0 and nothing to learn."""
    result = run_distill(DistillConfig(**chain, steps=2, batch_size=4, weight_decay=0.0))
    assert result.loss_first == pytest.approx(0.0, abs=1e-6)
    before, after = (load_file(Path(path) / "model.safetensors") for path in (chain["teacher"], chain["out"]))
    assert before.keys() == after.keys()
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-3


@pytest.mark.parametrize("options", [{"loss": "kl", "init": "random"}, {"loss": "ce"}])
def test_training_lowers_the_validation_loss(chain: dict[str, Any], options: dict[str, Any]) -> None:
    """The number reported is that of the checkpoint on disk, opened by the stock class."""
    if options["loss"] == "kl":  # a teacher worth learning from: trained on this data first
        taught = chain["out"].with_name("taught")
        settings = {"steps": 60, "batch_size": 8, "lr": 3e-3}
        run_distill(DistillConfig(**{**chain, "out": taught}, loss="ce", **settings))
        chain["teacher"] = str(taught)
    result = run_distill(DistillConfig(**chain, steps=60, batch_size=8, lr=3e-3, **options))
    assert result.val_loss_after < result.val_loss_before - 0.5
    assert result.loss_last < result.loss_first
    model = AutoModelForCausalLM.from_pretrained(chain["out"], dtype=torch.float32)
    split = TokenDataset(chain["data"]).split("validation")
    assert evaluate_split(model, split, batch_size=4).loss == pytest.approx(result.val_loss_after, abs=1e-5)
    curve = json.loads((chain["out"] / "curve.json").read_text())
    assert len(curve["loss"]) == 60 and curve["validation"][-1] == [60, result.val_loss_after]


def test_micro_batches_do_not_change_the_run(chain: dict[str, Any]) -> None:
    """Gradient accumulation over parts equals the whole batch (up to the order of sums)."""
    losses = []
    for part in (None, 2):
        out = chain["out"].with_name(f"out{part}")
        settings = {**chain, "out": out, "steps": 6, "batch_size": 8, "micro_batch": part, "init": "random", "lr": 1e-3}
        losses.append(run_distill(DistillConfig(**settings)).val_loss_after)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_checkpoint_keeps_its_type(tmp_path: Path, chain: dict[str, Any]) -> None:
    """A bf16 student is trained in fp32 and written in bf16 again."""
    make_tokenizer(tmp_path / "bf16")
    vocab = TokenDataset(chain["data"]).vocab_size
    student = make_model(tmp_path / "bf16", vocab_size=vocab, dtype=torch.bfloat16, **SMALL)
    run_distill(DistillConfig(**{**chain, "student": str(student)}, steps=2, batch_size=4))
    assert {tensor.dtype for tensor in load_file(chain["out"] / "model.safetensors").values()} == {torch.bfloat16}
    assert (chain["out"] / "tokenizer.json").exists()


def test_masked_tokens_do_not_teach(chain: dict[str, Any]) -> None:
    """With every target masked but one column, changing the other columns' tokens changes no loss of that column."""
    config = DistillConfig(**chain, steps=1, loss="ce")
    losses = []
    for last in (1, 2):
        model = load_model(chain["student"], device=torch.device("cpu"), dtype=torch.float32)
        ids = torch.tensor([[5, 6, 7, 8, last]])
        targets = torch.tensor([[False, True, False, False]])
        losses.append(Trainer(model, config, 1, torch.float32).update([Batch(ids, targets)], [], 0).loss)
    assert losses[0] == losses[1]


def test_learning_rate_shape() -> None:
    """Warm-up to the peak, cosine to min_lr of it at the last step."""
    config = DistillConfig(student="s", teacher="t", data=Path("d"), out=Path("o"), steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(config.min_lr)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_other_tokenizer_is_refused(tmp_path: Path, chain: dict[str, Any]) -> None:
    make_tokenizer(tmp_path / "other", vocab=300)
    student = make_model(tmp_path / "other", vocab_size=400, **SMALL)
    with pytest.raises(InputError, match="another tokenizer"):
        run_distill(DistillConfig(**{**chain, "student": str(student)}, steps=1))
    assert not list(tmp_path.glob("out*"))


def test_too_little_memory_is_refused_before_loading(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(ResourceError, match="--micro-batch"):
        run_distill(DistillConfig(**chain, steps=1))
    assert not chain["out"].with_name("out.partial").exists()


def test_a_disk_that_fills_midway_keeps_the_last_checkpoint(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third save fails; the second stays, and the same command ends as an undisturbed run does."""
    from minitron_cli.runtime import state

    real, calls = state.save_file, []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*arguments)

    settings = {"steps": 8, "batch_size": 4, "save_every": 2, "init": "random"}
    monkeypatch.setattr(state, "save_file", failing)
    with pytest.raises(RunError, match="The disk filled up"):
        run_distill(DistillConfig(**chain, **settings))
    assert Checkpoints(chain["out"].with_name("out.partial"), 1).newest()[1]["step"] == 4
    monkeypatch.setattr(state, "save_file", real)
    run_distill(DistillConfig(**chain, **settings))
    undisturbed = chain["out"].with_name("undisturbed")
    run_distill(DistillConfig(**{**chain, "out": undisturbed}, **settings))
    assert (chain["out"] / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, chain: dict[str, Any]) -> None:
    """NaN weights in the student: exit 1 territory, with the step named."""
    from safetensors.torch import save_file

    make_tokenizer(tmp_path / "nan")
    student = make_model(tmp_path / "nan", vocab_size=TokenDataset(chain["data"]).vocab_size, **SMALL)
    tensors = load_file(student / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError):
        run_distill(DistillConfig(**{**chain, "student": str(student)}, steps=2, batch_size=4))
