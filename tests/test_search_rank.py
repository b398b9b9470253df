"""What decides: the mix, KL to the teacher, errors of tasks; and how far orders agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers_eval
import pytest
import torch
from helpers_search import make_scored, search
from torch.nn.functional import kl_div

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.ranking import parse_mix
from minitron_cli.distill.trainer import Teacher
from minitron_cli.evaluate.harness import TaskSet
from minitron_cli.importance.stage import run_importance
from minitron_cli.models.load import load_model
from minitron_cli.search import scores
from minitron_cli.search.scores import TaskErrors, validation_kl
from minitron_cli.search.tau import kendall_tau
from minitron_cli.tokens import TokenDataset
from minitron_cli.tokens.writer import INDEX

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_scored(tmp_path_factory.mktemp("rank"))


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("loss", (("loss", 1.0),)),
        ("kl", (("kl", 1.0),)),
        ("loss+0.5*arc_easy", (("loss", 1.0), ("arc_easy", 0.5))),
        (" 1e+1*kl + 2*mmlu ", (("kl", 10.0), ("mmlu", 2.0))),
    ],
)
def test_mix(spec: str, terms: tuple[tuple[str, float], ...]) -> None:
    mix = parse_mix(spec)
    assert mix.terms == terms
    assert mix.tasks == tuple(name for name, _ in terms if name not in ("loss", "kl"))
    values = {name: 0.25 * place for place, (name, _) in enumerate(terms, 1)}
    assert mix.of(values) == sum(weight * values[name] for name, weight in terms)


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),  # one of six pairs the other way round
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -4 / (8 * 9) ** 0.5),  # 2 of 10 pairs tied in one, 1 in the other
        ([1, float("inf"), 2], [1, 3, 2], 1.0),
        ([1, 1], [1, 2], None),
        ([1], [1], None),
    ],
)
def test_kendall_tau(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


def test_kl_is_that_of_all_logits(settings: dict[str, Any]) -> None:
    """Against the definition, over the whole validation split at once; zero for the teacher itself."""
    path = resolve(settings["checkpoint"])
    teacher, student = (load_model(path, device=CPU, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        student.lm_head.weight.mul_(0.9)
    split = TokenDataset(settings["data"]).split("validation")
    models = {"student": student, "same": load_model(path, device=CPU, dtype=torch.float32)}
    found = validation_kl(models, Teacher(teacher), split, sequences=99, batch_size=3, device=CPU)
    ids = torch.from_numpy(split.rows(range(len(split))))
    with torch.no_grad():
        ours, theirs = (model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in (student, teacher))
    expected = kl_div(ours, theirs, log_target=True, reduction="sum") / len(ours)
    assert found["student"] == pytest.approx(float(expected), abs=1e-6) and abs(found["same"]) < 1e-6


def test_a_mix_decides(settings: dict[str, Any], tmp_path: Path) -> None:
    """The score is the mix, at every rung, and another mix gives another order where the measures disagree."""
    result = search(settings, tmp_path / "out", rank="loss+3*kl", rungs=1, steps=2)
    for row in result.candidates:
        point = row["curve"][-1]
        assert row["score"] == point["loss"] + 3 * point["kl"] and row["loss_retrained"] == point["loss"]
    assert [row["score"] for row in result.candidates] == sorted(row["score"] for row in result.candidates)
    by_loss = sorted(result.candidates, key=lambda row: row["loss_retrained"])
    assert [row["name"] for row in by_loss] != [row["name"] for row in result.candidates]


def test_task_errors_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MMLU subject from local files: 1 - accuracy joins the loss; the files are an input of the search."""
    checkpoint = helpers_eval.make_checkpoint(tmp_path / "model")
    data = tmp_path / "data"
    helpers_eval.make_data(data)
    write_train_split(data)
    folder = helpers_eval.make_mmlu(tmp_path / "mmlu", ["anatomy"])
    run_importance(ImportanceConfig(checkpoint=str(checkpoint), data=data, out=tmp_path / "imp", samples=4))
    settings = {
        "checkpoint": str(checkpoint), "importance": tmp_path / "imp", "data": data, "params_range": "50%:99%",
        "grid": ("ffn=16,32",), "candidates": 2, "finalists": 2, "rungs": 1, "steps": 1, "batch_size": 2,
        "rank": "loss+10*mmlu_anatomy", "task_dir": folder, "task_limit": 2,
    }  # fmt: skip
    result = search(settings, tmp_path / "out")
    for row in result.candidates:
        point = row["curve"][-1]
        assert point["mmlu_anatomy"] in (0.0, 0.5, 1.0)
        assert row["score"] == point["loss"] + 10 * point["mmlu_anatomy"]
    manifest = json.loads((tmp_path / "out" / "minitron.json").read_text())
    assert "tasks" in manifest["inputs"]


def write_train_split(data: Path) -> None:
    """Give a data set of the evaluator's tests a split to train on."""
    index = json.loads((data / INDEX).read_text())
    index["splits"]["train"] = index["splits"]["validation"]
    (data / INDEX).write_text(json.dumps(index))
    (data / "train.tokens").write_bytes((data / "validation.tokens").read_bytes())


@pytest.mark.parametrize(("higher", "error"), [(True, 0.75), (False, 0.25)])
def test_error_of_a_metric(higher: bool, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - what is better when higher, as it is what is better when lower; means of a tag's tasks."""

    class Task:
        def higher_is_better(self) -> dict[str, bool]:
            return {"score": higher}

    tasks = TaskSet(leaves={"a": Task(), "b": Task()}, roots=["a", "b"])
    metrics = {"a": {"samples": 3, "score": 0.2}, "b": {"samples": 3, "score": 0.3}}
    monkeypatch.setattr(scores, "run_tasks", lambda *arguments, **options: (metrics, {}))
    errors = TaskErrors.__new__(TaskErrors)
    errors.config, errors.tasks, errors.tokenizer = type("C", (), {"task_limit": None})(), {"x": tasks}, None
    model = torch.nn.Linear(1, 1).train()
    assert errors.of(model, "x", 1) == {"x": pytest.approx(error)}
