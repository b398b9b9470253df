"""The funnel's training: a step is a step of distill, groups and kills change nothing, halving is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_chain import make_checkpoint
from helpers_search import found, make_scored, search

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.distill.checkpoints import Checkpoints
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.trainer import NotFinite, Teacher, Trainer
from minitron_cli.errors import ConfigError, RunError
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.stage import run_prune
from minitron_cli.search import stage
from minitron_cli.search.course import Course
from minitron_cli.search.halving import Schedule, better_half, rung_ends
from minitron_cli.search.journal import Journal
from minitron_cli.search.measure import CutCheckpoint, ZeroShot
from minitron_cli.tokens import TokenDataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_scored(tmp_path_factory.mktemp("funnel"))


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an undisturbed search writes."""
    out = tmp_path_factory.mktemp("whole") / "search"
    search(settings, out)
    return found(out)


def test_rung_ends() -> None:
    assert rung_ends(400, 3) == [100, 200, 400]
    assert rung_ends(20, 3) == [5, 10, 20]
    assert rung_ends(7, 3) == [1, 3, 7]
    assert rung_ends(1, 1) == [1]
    with pytest.raises(ConfigError, match="give 8 steps or more, or --rungs 3"):
        rung_ends(7, 4)


@pytest.mark.parametrize("steps", range(1, 40))
def test_rungs_rise_to_the_last_step(steps: int) -> None:
    for rungs in range(1, steps.bit_length() + 1):
        ends = rung_ends(steps, rungs)
        assert ends == sorted(set(ends)) and ends[0] >= 1 and ends[-1] == steps and len(ends) == rungs


def test_schedule() -> None:
    """8 + 3 candidates over 100, 100 and 200 steps: halves are rounded up, size by size."""
    assert [better_half(count) for count in (1, 2, 3, 8)] == [1, 1, 2, 4]
    schedule = Schedule.of((8, 3), 400, 3, 1000)
    assert schedule.alive == [11, 6, 3] and schedule.lengths == [100, 100, 200]
    assert schedule.student_tokens == 1000 * (1100 + 600 + 600)
    assert schedule.teacher_tokens([1, 1, 1]) == 400_000 and schedule.teacher_tokens([3, 2, 1]) == 700_000


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_one_candidate_is_a_distill_run(settings: dict[str, Any], cached: bool, tmp_path: Path) -> None:
    """Cut and distilled by the search, or by prune and distill: every loss is the same to the bit."""
    teacher = str(make_checkpoint(tmp_path / "teacher", seed=1))
    more: dict[str, Any] = {"cache_teacher": tmp_path / "cache", "top_k": 20} if cached else {}
    more |= {"teacher": teacher, "micro_batch": 2}
    result = search(settings, tmp_path / "search", candidates=1, finalists=1, rungs=1, **more)
    run_prune(PruneConfig(checkpoint=settings["checkpoint"], search=tmp_path / "search", out=tmp_path / "pruned"))
    config = DistillConfig(
        student=str(tmp_path / "pruned"), data=settings["data"], steps=4, batch_size=4,
        lr=1e-3, eval_sequences=4, eval_every=3, out=tmp_path / "student", **more,
    )  # fmt: skip
    run_distill(config)
    distilled = json.loads((tmp_path / "student" / "curve.json").read_text())
    (searched,) = json.loads((tmp_path / "search" / "curves.json").read_text()).values()
    assert searched["loss"] == distilled["loss"] and searched["tokens_per_step"] == distilled["tokens_per_step"]
    (row,) = result.candidates
    assert [[point["step"], point["loss"]] for point in row["curve"]] == distilled["validation"]


def test_groups_change_nothing(
    settings: dict[str, Any], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at a time, two, or one: the same bytes, and as many teacher passes as groups."""
    lessons = [0]
    real = Teacher.lesson

    def counted(teacher: Teacher, batch: Any) -> Any:
        lessons[0] += 1
        return real(teacher, batch)

    def pairs(course: Course, students: dict[str, Any]) -> list[list[str]]:
        names = list(students)
        return [names[start : start + size] for start in range(0, len(names), size)]

    monkeypatch.setattr(Teacher, "lesson", counted)
    monkeypatch.setattr(Course, "groups", pairs)
    for size, passes in ((4, 4), (2, 2 * 2 + 2), (1, 4 * 2 + 2 * 2)):
        lessons[0] = 0
        search(settings, tmp_path / str(size))
        assert found(tmp_path / str(size)) == whole and lessons[0] == passes


def test_groups_change_nothing_with_a_cached_teacher(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another they read the cache from its start again; no model is asked once it is written."""
    cached = {**settings, "cache_teacher": tmp_path / "cache", "candidates": 3, "top_k": 20}
    search(cached, tmp_path / "together")
    monkeypatch.setattr(Course, "groups", lambda course, students: [[name] for name in students])
    monkeypatch.setattr(Teacher, "lesson", lambda *arguments: pytest.fail("asked"))
    search(cached, tmp_path / "alone")
    assert found(tmp_path / "alone") == found(tmp_path / "together")


def test_groups_fill_memory(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups keep the order, hold as many as fit, and a single one always goes alone."""
    courses: list[Course] = []
    real = Course.groups

    def seen(course: Course, students: dict[str, Any]) -> list[list[str]]:
        courses.append(course)
        return real(course, students)

    monkeypatch.setattr(Course, "groups", seen)
    search(settings, tmp_path / "out")
    shape = Checkpoint(Path(settings["checkpoint"])).shape
    students = dict.fromkeys("abcde", shape)
    alone, two = (courses[0]._bytes([shape] * count) for count in (1, 2))
    assert replace(courses[0], free=alone).groups(students) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert replace(courses[0], free=two).groups(students) == [["a", "b"], ["c", "d"], ["e"]]
    assert replace(courses[0], free=two - 1).groups(students)[0] == ["a"]
    assert two - alone == 12 * shape.params, "another one waits with its weights and two moments"


@pytest.mark.parametrize("owner", [Journal, Checkpoints])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_every_write(
    settings: dict[str, Any], whole: bytes, owner: type, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right before or right after every third write of the state, again and again: the same bytes."""
    real = owner.save  # type: ignore[attr-defined]
    calls = [0]

    class Killed(BaseException):
        pass

    def stopping(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] % 3 == 0 and not after:
            raise Killed
        real(*arguments)
        if calls[0] % 3 == 0:
            raise Killed

    monkeypatch.setattr(owner, "save", stopping)
    for _ in range(20):
        try:
            search(settings, tmp_path / "out")
            break
        except Killed:
            assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    assert calls[0] >= 6 and found(tmp_path / "out") == whole


@pytest.mark.parametrize("call", [1, 6, 9])
def test_stopped_inside_a_step(
    settings: dict[str, Any], whole: bytes, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some candidates have made the step and others not; nothing was saved."""
    real, calls = Trainer.update, [0]

    def stopping(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(settings, tmp_path / "out")
    search(settings, tmp_path / "out")
    assert found(tmp_path / "out") == whole


def test_who_left_is_gone_from_disk(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Trainer.update, [0]

    def looking(trainer: Trainer, batches: Any, lessons: Any, step: int) -> Any:
        if step == 3:
            seen[0] = len(list((tmp_path / "out.partial").glob("state.candidate-*.safetensors")))
        return real(trainer, batches, lessons, step)

    monkeypatch.setattr(Trainer, "update", looking)
    search(settings, tmp_path / "out")
    assert seen[0] == 2


def test_a_candidate_that_fails_leaves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not finite in its second step: it comes last, keeps what it has, and the others decide; all fail: an error."""
    first = search(settings, tmp_path / "first").candidates[0]["name"]
    real = Trainer.update
    model_of: dict[int, str] = {}
    everybody = [False]

    def failing(trainer: Trainer, batches: Any, lessons: Any, step: int) -> Any:
        params = sum(parameter.numel() for parameter in trainer.model.parameters())
        if everybody[0] or (step == 1 and model_of.get(params) == first):
            raise NotFinite("The loss is nan.")
        return real(trainer, batches, lessons, step)

    rows = search(settings, tmp_path / "first").candidates
    model_of |= {row["params"]: row["name"] for row in rows}
    monkeypatch.setattr(Trainer, "update", failing)
    result = search(settings, tmp_path / "second")
    last = result.candidates[-1]
    assert (last["name"], last["failed_at"], last["steps"], last["loss_retrained"]) == (first, 1, 1, None)
    assert result.chosen is not None and result.chosen["name"] != first
    json.loads((tmp_path / "second" / "search.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    everybody[0] = True
    with pytest.raises(RunError, match="try a lower --lr"):
        search(settings, tmp_path / "third")


def test_streamed_is_resident(settings: dict[str, Any], tmp_path: Path) -> None:
    """A candidate that is measured layer by layer has the loss of the whole one, to the bit."""
    out = tmp_path / "search"
    row = search(settings, out, finalists=0, rank="loss", micro_batch=3, batch_size=3).candidates[0]
    checkpoint = Checkpoint(Path(settings["checkpoint"]))
    plan = PrunePlan.from_json(json.loads((out / "plan.json").read_text()))
    split = TokenDataset(settings["data"]).split("validation")
    (tmp_path / "work").mkdir()
    zero_shot = ZeroShot(
        checkpoint, split, sequences=4, batch_size=3, device=torch.device("cpu"), dtype=torch.float32,
        scratch=tmp_path / "work" / "states",
    )  # fmt: skip
    assert zero_shot.streamed_loss(CutCheckpoint(checkpoint, plan)) == zero_shot.resident_loss(plan)
    assert zero_shot.loss(plan) == row["loss_zero_shot"]


def test_what_does_not_fit_is_streamed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself where memory is short; states between layers then lie on disk."""
    expected = search(settings, tmp_path / "resident", finalists=0).candidates
    streamed: list[CutCheckpoint] = []
    real = ZeroShot.streamed_loss

    def counted(zero_shot: ZeroShot, cut: CutCheckpoint) -> float:
        streamed.append(cut)
        return real(zero_shot, cut)

    monkeypatch.setattr(ZeroShot, "streamed_loss", counted)
    monkeypatch.setattr("minitron_cli.search.measure.available_bytes", lambda device: 100)
    monkeypatch.setattr("minitron_cli.search.measure.require_memory", lambda *arguments: None)
    assert search(settings, tmp_path / "streamed", finalists=0).candidates == expected
    assert len(streamed) == 4
    assert not list((tmp_path / "streamed").glob("state*"))


def test_micro_batch_of_an_interrupted_search_holds(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory differs from start to start; sums of other parts would round differently."""
    asked: list[int | None] = []
    real = Course.within_memory

    def seen(course: Course, students: Any, before: int | None, group: Any) -> Course:
        asked.append(before)
        return real(course, students, before, group)

    monkeypatch.setattr(Course, "within_memory", seen)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "Funnel", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search(settings, tmp_path / "out")
    search(settings, tmp_path / "out")
    assert asked == [None, 4]


def test_a_loss_that_is_not_finite_is_the_worst(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one candidate: it comes last, and the file stays plain JSON; of all: an error."""
    calls, real = [0], ZeroShot.loss

    def failing(zero_shot: ZeroShot, plan: PrunePlan) -> float:
        calls[0] += 1
        if calls[0] == 1 or calls[0] > 4:
            raise RunError("The loss is nan on sequences 0 to 3.")
        return real(zero_shot, plan)

    monkeypatch.setattr(ZeroShot, "loss", failing)
    rows = search(settings, tmp_path / "one", finalists=0).candidates
    assert [row["loss_zero_shot"] is None for row in rows] == [False, False, False, True]
    json.loads((tmp_path / "one" / "search.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    with pytest.raises(RunError, match="None of 4 candidates has a finite loss"):
        search(settings, tmp_path / "all", finalists=0)


def test_search_without_a_teacher(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conventional retraining asks nobody."""
    monkeypatch.setattr(Teacher, "lesson", lambda *arguments: pytest.fail("asked"))
    result = search(settings, tmp_path / "out", loss="ce", candidates=2, finalists=2)
    assert [row["steps"] for row in result.candidates] == [4, 2]
