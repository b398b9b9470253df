"""`minitron correct`: conventional retraining of the teacher by the same loop, as a stage of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_chain import make_checkpoint, make_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_cli.config.correct import CorrectConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.correct import plan_correct, run_correct
from minitron_cli.distill.loop import Run
from minitron_cli.distill.stage import run_distill
from minitron_cli.errors import InputError
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.tokens import TokenDataset


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    teacher = make_checkpoint(tmp_path / "teacher")
    data = make_data(tmp_path / "data", teacher)
    return {"data": data, "steps": 30, "batch_size": 8, "lr": 3e-3, "out": tmp_path / "corrected"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_the_corrected_teacher_knows_the_corpus(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its validation loss falls, and it is a plain checkpoint that a student can learn from."""
    result = run_correct(CorrectConfig(teacher=str(tmp_path / "teacher"), **settings))
    assert result.val_loss_before is not None and result.val_loss_after is not None
    assert result.val_loss_after < result.val_loss_before - 0.5
    keys = {"out", "steps", "tokens", "loss_first", "loss_last", "val_loss_before", "val_loss_after"}
    assert keys | {"tokens_per_second", "peak_rss_bytes"} <= result.to_json().keys()
    model = AutoModelForCausalLM.from_pretrained(settings["out"], dtype=torch.float32)
    split = TokenDataset(settings["data"]).split("validation")
    assert evaluate_split(model, split, batch_size=4).loss == pytest.approx(result.val_loss_after, abs=1e-5)
    manifest = json.loads((settings["out"] / "minitron.json").read_text())
    assert manifest["stage"] == "correct" and manifest["inputs"].keys() == {"teacher", "data"}
    assert manifest["config"]["teacher"] == str(tmp_path / "teacher") and "loss" not in manifest["config"]
    student = {"student": str(tmp_path / "teacher"), "teacher": str(settings["out"])}
    taught = run_distill(DistillConfig(**{**settings, **student, "out": tmp_path / "student"}))
    assert taught.val_loss_after is not None and taught.val_loss_after < result.val_loss_before - 0.5


def test_it_is_conventional_retraining(settings: dict[str, Any], tmp_path: Path) -> None:
    """The bytes are those of `distill TEACHER --loss ce`: no second trainer."""
    run_correct(CorrectConfig(teacher=str(tmp_path / "teacher"), **settings))
    same = {**settings, "student": str(tmp_path / "teacher"), "loss": "ce", "out": tmp_path / "same"}
    run_distill(DistillConfig(**same))
    one, other = weights(settings["out"]), weights(tmp_path / "same")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_default_rate_is_low(settings: dict[str, Any]) -> None:
    assert CorrectConfig(teacher="t", data=settings["data"], out=settings["out"], steps=1).training().lr == 6e-5


def test_it_resumes_and_a_second_run_is_up_to_date(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = CorrectConfig(teacher=str(tmp_path / "teacher"), **settings, save_every=4)
    run_correct(CorrectConfig(**{**config.to_json(), "out": tmp_path / "undisturbed"}))
    real = Run.advance

    def stopping(self: Run) -> int:
        if self.step == 10:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_correct(config)
    run_correct(config)
    assert "Resuming at step 8" in capfd.readouterr().err
    one, other = weights(settings["out"]), weights(tmp_path / "undisturbed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    run_correct(config)
    assert "up to date" in capfd.readouterr().err


def test_dry_run_counts_no_second_model(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_correct(CorrectConfig(teacher=str(tmp_path / "teacher"), **settings))
    assert plan.steps == 30 and plan.memory["teacher"] == 0 and not settings["out"].exists()


def test_messages_call_it_the_teacher(settings: dict[str, Any], tmp_path: Path) -> None:
    from helpers import make_model
    from helpers_chain import SMALL
    from helpers_tokenizer import make_tokenizer

    make_tokenizer(tmp_path / "other", vocab=300)
    other = make_model(tmp_path / "other", vocab_size=400, **SMALL)
    with pytest.raises(InputError, match="another tokenizer than that of the teacher"):
        run_correct(CorrectConfig(teacher=str(other), **settings))
    assert not list(tmp_path.glob("corrected*"))
