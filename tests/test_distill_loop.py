"""The training loop: checkpoints that survive damage, logs that survive kills, signals, memory that runs out, NaN."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_chain import make_checkpoint, make_data
from safetensors.torch import load_file

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill import logs as logs_module
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.interrupts import Interrupted, Interrupts
from minitron_cli.distill.logs import JsonLines, TensorBoard, WeightsAndBiases, require_log, scalars
from minitron_cli.distill.loop import Run
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.trainer import NotFinite, Trainer
from minitron_cli.errors import ConfigError, RunError
from minitron_cli.manifest import read_manifest, write_json
from minitron_cli.runtime.state import load_state
from minitron_cli.tokens import TokenDataset, batch_rows


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Any]:
    checkpoint = make_checkpoint(tmp_path / "teacher")
    data = make_data(tmp_path / "data", checkpoint)
    return {"student": str(checkpoint), "teacher": str(checkpoint), "data": data, "out": tmp_path / "out",
            "steps": 6, "batch_size": 4, "save_every": 2, "init": "random", "eval_every": 3}  # fmt: skip


def partial_of(chain: dict[str, Any]) -> Path:
    return Path(chain["out"]).with_name(Path(chain["out"]).name + ".partial")


def model_bytes(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def undisturbed(chain: dict[str, Any]) -> Path:
    out = Path(chain["out"]).with_name("undisturbed")
    run_distill(DistillConfig(**{**chain, "out": out}))
    return out


def broken_at(step: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of that number (from 0) fails once."""
    real, failed = Trainer.update, []

    def update(self: Trainer, batches: Any, lessons: Any, number: int) -> Any:
        if number == step and not failed:
            failed.append(1)
            raise error()
        return real(self, batches, lessons, number)

    monkeypatch.setattr(Trainer, "update", update)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(50, 7, generator=generator), "b": torch.tensor(float(seed)), "empty": torch.zeros(0)}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 10, 100):
        checkpoints.save(step, tensors(step), {"step": step})
        assert checkpoints.path(step) in checkpoints.found()
    assert checkpoints.found() == [checkpoints.path(10), checkpoints.path(100)]
    found, values = checkpoints.newest()
    assert values == {"step": 100}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(100).items())


def test_the_old_one_goes_only_when_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file operation a kill comes before, a whole checkpoint is found."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(1), {"step": 1})
    for name in ("replace", "unlink"):

        class Killed(BaseException):
            pass

        def killed(*_: Any, **__: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, name, killed)
            patch.setattr(Path, name, killed)
            checkpoints.save(2, tensors(2), {"step": 2})
        survivor = Checkpoints(tmp_path, keep=1).newest()
        assert survivor is not None and survivor[1]["step"] in (1, 2)
    checkpoints.save(3, tensors(3), {"step": 3})
    assert [item.name for item in tmp_path.iterdir()] == ["state.step-000000003.safetensors"]


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def zeros_at_the_end(data: bytes) -> bytes:
    return data[:-400] + bytes(400)


def one_bit(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def other_header(data: bytes) -> bytes:
    return data[:8] + b"!" * 40 + data[48:]


@pytest.mark.parametrize("damage", [cut_short, empty, zeros_at_the_end, one_bit, other_header])
def test_a_damaged_newest_falls_back(
    damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, tensors(step), {"step": step})
    path = checkpoints.path(2)
    path.write_bytes(damage(path.read_bytes()))
    found = checkpoints.newest()
    assert found is not None and found[1]["step"] == 1
    assert "state.step-000000002.safetensors is damaged" in capsys.readouterr().err
    assert checkpoints.found() == [checkpoints.path(1)]
    path = checkpoints.path(1)
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.newest() is None


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --keep 2; the end is that of an undisturbed run."""
    chain["keep"] = 2
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        broken_at(5, ZeroDivisionError, patch)
        run_distill(DistillConfig(**chain))
    found = Checkpoints(partial_of(chain), 2).found()
    assert [load_state(path)[1]["step"] for path in found] == [2, 4]
    found[1].write_bytes(found[1].read_bytes()[:-1])
    run_distill(DistillConfig(**chain))
    said = capsys.readouterr().err
    assert "is damaged" in said and "Resuming at step 2 of 6" in said
    assert model_bytes(chain["out"]) == model_bytes(undisturbed(chain))
    assert not list(chain["out"].glob("state.*"))


# --- signals ----------------------------------------------------------------------------------------------------------


def test_signals_wait_for_the_shield_and_then_act_as_before() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
            with interrupts.shielded():
                signal.raise_signal(signal.SIGTERM)
                done = True
            pytest.fail("it goes on after the shield")
        assert done and heard == []
        caught.value.again()
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.shielded():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one acts at once")


def test_an_interrupt_during_validation_saves_and_the_curve_is_whole(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 is validated; the interrupt comes before its loss is known, and no checkpoint was due."""
    real, rounds = Run.validate, []

    def validate(self: Run) -> None:
        rounds.append(self.step)
        if rounds == [0, 3]:
            signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(Run, "validate", validate)
    with pytest.raises(KeyboardInterrupt):
        run_distill(DistillConfig(**chain))
    assert Checkpoints(partial_of(chain), 1).newest()[1]["step"] == 3
    run_distill(DistillConfig(**chain))
    other = undisturbed(chain)
    for name in ("curve.json", "model.safetensors"):
        assert (chain["out"] / name).read_bytes() == (other / name).read_bytes()
    assert [step for step, _ in json.loads((other / "curve.json").read_text())["validation"]] == [0, 3, 6]


# --- memory that runs out, numbers that are none ----------------------------------------------------------------------


def test_out_of_memory_at_the_first_step_halves_the_micro_batch(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state is untouched: from there on the run equals one with that micro-batch; a resumed one keeps it."""
    with monkeypatch.context() as patch:
        broken_at(0, lambda: torch.OutOfMemoryError("CUDA out of memory"), patch)
        patch.setattr(Run, "save", lambda self: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            run_distill(DistillConfig(**chain))
    assert "going on with 2 sequences per forward pass" in capsys.readouterr().err
    run_distill(DistillConfig(**chain))
    assert "2 of 4 sequences per forward pass" in capsys.readouterr().err
    out = chain["out"].with_name("explicit")
    run_distill(DistillConfig(**{**chain, "out": out, "micro_batch": 2}))
    assert model_bytes(chain["out"]) == model_bytes(out)


def test_out_of_memory_later_is_an_error(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(1, lambda: torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run_distill(DistillConfig(**chain))


def test_a_step_that_is_not_finite_leaves_weights_batch_and_checkpoint(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient turns NaN in step 4; the state and the saved batch are those before it."""
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters: Any, largest: float) -> torch.Tensor:
        parameters = list(parameters)
        seen.append([parameter.detach().clone() for parameter in parameters])
        if len(seen) == 4:
            parameters[0].grad[0, 0] = float("nan")
        return real(parameters, largest)

    trainers = []
    start = Trainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda self, *args, **kw: trainers.append(self) or start(self, *args, **kw))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
        with pytest.raises(RunError, match="at step 4") as caught:
            run_distill(DistillConfig(**chain))
    for parameter, before in zip(trainers[0].parameters.values(), seen[3], strict=True):
        assert torch.equal(parameter, before)
    path = partial_of(chain) / "not-finite.step-4.safetensors"
    assert str(path) in str(caught.value) and "state.step-000000002" in str(caught.value)
    saved, values = load_state(path)
    data = TokenDataset(chain["data"])
    rows = batch_rows(0, 3, 4, len(data.split("train")))
    assert values == {"step": 4, "rows": rows}
    assert saved["ids"].tolist() == data.split("train").rows(rows).tolist()
    assert saved["targets"].all()
    run_distill(DistillConfig(**chain))
    assert model_bytes(chain["out"]) == model_bytes(undisturbed(chain))
    assert not list(chain["out"].glob("not-finite*"))


def test_not_finite_is_told_without_a_checkpoint_too(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(0, lambda: NotFinite("The loss is nan and the gradient's norm nan at step 1."), monkeypatch)
    with pytest.raises(RunError, match="no checkpoint was due"):
        run_distill(DistillConfig(**chain))


def test_compile_that_fails_is_one_sentence_before_any_step(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore text.")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend=backend))
    with pytest.raises(ConfigError) as caught:
        run_distill(DistillConfig(**chain, compile=True))
    message = str(caught.value)
    assert "--compile does not work here" in message and "C compiler" in message and "\n" not in message
    assert not chain["out"].exists() and not partial_of(chain).exists()


# --- logs -------------------------------------------------------------------------------------------------------------


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_the_log_says_what_each_step_was(chain: dict[str, Any]) -> None:
    result = run_distill(DistillConfig(**{**chain, "loss": "0.5*kl+0.5*ce", "lr": 1e-3}))
    records = read_log(chain["out"])
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in steps] == [64, 128, 192, 256, 320, 384] and result.tokens == 384
    for record in steps:
        assert record["loss"] == pytest.approx(0.5 * record["terms"]["kl"] + 0.5 * record["terms"]["ce"])
        assert record["gradient_norm"] > 0 and record["tokens_per_second"] > 0
    assert steps[0]["learning_rate"] == 1e-3 and steps[-1]["learning_rate"] == pytest.approx(1e-4)
    curve = json.loads((chain["out"] / "curve.json").read_text())
    assert [record["loss"] for record in steps] == curve["loss"]
    shown = [[record["step"], record["validation"]] for record in records if "validation" in record]
    assert shown == curve["validation"] and shown[-1] == [6, result.val_loss_after]


def test_a_resumed_log_has_each_step_once(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 and the validation of 3 are on disk or not; the checkpoint is of step 4."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        broken_at(5, ZeroDivisionError, patch)
        run_distill(DistillConfig(**chain))
    log = partial_of(chain) / "log.jsonl"
    assert read_log(partial_of(chain))[-1]["step"] == 5
    with log.open("a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the middle of a line
    run_distill(DistillConfig(**chain))
    times = {"tokens_per_second"}
    strip = [{name: value for name, value in record.items() if name not in times} for record in read_log(chain["out"])]
    other = [
        {name: value for name, value in record.items() if name not in times} for record in read_log(undisturbed(chain))
    ]
    assert strip == other


def test_lines_beyond_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 0, "validation": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 2.0}',
             '{"step": 2, "validation": 2.5}', '{"step": 3, "loss": 1.0}', "not json"]  # fmt: skip
    path.write_text("\n".join(lines))
    JsonLines(path, 2, {0}).close()
    assert path.read_text().splitlines() == lines[:3]
    JsonLines(path, 0, ()).close()
    assert path.read_text() == ""


def test_records_as_flat_numbers() -> None:
    record = {"step": 3, "loss": 1.0, "terms": {"kl": 0.5, "blocks": 2.0}}
    assert scalars(record) == {"loss": 1.0, "terms/kl": 0.5, "terms/blocks": 2.0}


def test_a_service_not_installed_is_one_sentence(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            run_distill(DistillConfig(**chain, log=name))
    require_log(None)
    assert not partial_of(chain).exists()


def test_weights_and_biases_gets_every_record(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One run per output: a resumed process continues it."""
    started: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]]] = []

    def init(**options: Any) -> SimpleNamespace:
        started.append(options)
        return SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(logs_module.importlib.util, "find_spec", lambda name: object())
    run_distill(DistillConfig(**chain, log="wandb"))
    records = read_log(chain["out"])
    assert sent == [(record["step"], scalars(record)) for record in records]
    WeightsAndBiases(chain["out"])
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["name"] == "out"

    def refuse(**options: Any) -> Any:
        raise RuntimeError("api_key not configured (no-tty).\nSecond line")

    fake.init = refuse  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--log wandb cannot start: api_key not configured"):
        run_distill(DistillConfig(**{**chain, "out": chain["out"].with_name("other")}, log="wandb"))


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path, 0)
    board.write({"step": 1, "loss": 2.0, "terms": {"kl": 1.0}})
    board.sync()
    board.close()
    assert any(item.stat().st_size > 100 for item in tmp_path.iterdir())


# --- provenance -------------------------------------------------------------------------------------------------------


def test_the_audit_of_the_data_travels_with_the_model(chain: dict[str, Any]) -> None:
    assert run_distill(DistillConfig(**chain)).consent is None
    consent = {"corpus": {"documents": 3, "status": {"allowed": {"documents": 3, "tokens": 90}}}}
    write_json(chain["data"] / "minitron.json", {"stage": "data", "key": "k", "result": {"consent": consent}})
    out = chain["out"].with_name("audited")
    result = run_distill(DistillConfig(**{**chain, "out": out}))
    assert result.consent == consent
    assert read_manifest(out)["result"]["consent"] == consent
    assert load_file(out / "model.safetensors").keys() == load_file(chain["out"] / "model.safetensors").keys()
