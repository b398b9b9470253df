"""The first section: one sentence, what it means, and the table of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitron_cli.checkpoint.card import shown
from minitron_cli.drawing.format import NONE, count, fixed, number, percent, ratio, signed
from minitron_cli.report.gather import Model, RunFiles, table
from minitron_cli.report.speed import speed_sentence
from minitron_cli.report.tasks import kept_sentence, task_roots
from minitron_cli.runtime.progress import duration

TASK_COLUMNS = 3
"""Task scores shown beside the losses; all of them follow in a table of their own where there are more."""

PRODUCTS = {"aligned": "aligned model", "student": "student", "pruned": "pruned model"}
"""What a run may end with, the last first, and what the first sentence calls it."""


def answer(files: RunFiles) -> dict[str, Any] | None:
    """What the first section shows, or None for a run that has not reached any model."""
    teacher, student = files.model("teacher"), the_student(files)
    if not files.models:
        return _chosen(files)
    roots = task_roots(files)
    shown = roots[:TASK_COLUMNS] if len(roots) > TASK_COLUMNS else roots
    return {
        "teacher": teacher,
        "student": student,
        "headline": headline(files, teacher, student),
        "findings": findings(files),
        "columns": [f"{task} ({metric})" if metric else task for task, metric in shown],
        "rows": [_row(model, teacher, shown) for model in files.models],
        "note": _note(files),
    }


def _chosen(files: RunFiles) -> dict[str, Any] | None:
    """Of a search by itself: the shape it chose, and against how many."""
    best = table((files.search or {}).get("chosen"))
    if not best:
        return None
    plan = files.plan or {}
    parts = headline(files, None, None)
    parts |= {"student": str(best.get("name")), "student_params": count(best.get("params"))}
    before, after = plan.get("params_before"), plan.get("params_after")
    if number(before):
        parts |= {"teacher_params": count(before), "share": f"{percent(after, before)} of all"}
    loss, trained = best.get("loss_zero_shot"), best.get("loss_retrained")
    fitting = f"Chosen of {count((files.search or {}).get('feasible'))} shapes within the budget"
    what = f"{fixed(trained)} after a short distillation" if number(trained) is not None else "not distilled yet"
    found = [f"{fitting}; loss right after the cut {fixed(loss)} nats per token, {what}."]
    nothing: dict[str, Any] = {"teacher": None, "student": None, "columns": [], "rows": [], "note": ""}
    return {**nothing, "headline": parts, "findings": found}


def the_student(files: RunFiles) -> Model | None:
    """What came out: the aligned or the distilled model, or the pruned one where it went no further."""
    return next((model for name in PRODUCTS if (model := files.model(name))), None)


def headline(files: RunFiles, teacher: Model | None, student: Model | None) -> dict[str, str]:
    """The parts of the first sentence; empty where nothing is known."""
    parts = dict.fromkeys(
        ("teacher", "teacher_params", "student", "student_params", "share", "before", "after", "gap"), ""
    )
    name = str(
        files.recipe.get("teacher") or files.run.get("teacher") or (teacher.path if teacher else "") or "teacher"
    )
    parts["teacher"] = shown(name)
    if teacher is not None and teacher.params is not None:
        parts["teacher_params"] = count(teacher.params)
    if student is None:
        return parts
    parts["student"] = PRODUCTS[student.name]
    if student.params is not None:
        parts["student_params"] = count(student.params)
    if teacher is not None and teacher.non_embedding and student.non_embedding is not None:
        parts["share"] = percent(student.non_embedding, teacher.non_embedding)
    if teacher is not None and teacher.loss is not None and student.loss is not None:
        gap = signed(student.loss - teacher.loss)
        parts |= {"before": fixed(teacher.loss), "after": fixed(student.loss), "gap": gap}
    return parts


def findings(files: RunFiles) -> list[str]:
    """What the numbers say, in words: what was kept, and what it cost."""
    student = the_student(files)
    if student is None:
        return []
    more = [kept_sentence(files, student), speed_sentence(files), _cost(files, student)]
    return [*_losses(files), *(sentence for sentence in more if sentence)]


def _cost(files: RunFiles, student: Model) -> str:
    """Time and tokens, where they are known."""
    seconds = sum(number(manifest.get("seconds")) or 0.0 for manifest in files.manifests.values())
    if not seconds or not files.recipe:
        return ""
    tokens = f" and {count(student.tokens)} training tokens" if student.tokens else ""
    return f"All stages together took {duration(seconds)}{tokens}."


def _losses(files: RunFiles) -> list[str]:
    """The share of the loss recovered, and the comparisons."""
    teacher, pruned, student = (files.model(name) for name in ("teacher", "pruned", "student"))
    if teacher is None or student is None or teacher.loss is None or student.loss is None:
        return []
    distilled = files.config("student").get("loss", "kl") == "kl"
    found = []
    if pruned is not None and pruned.loss is not None and pruned.loss > max(teacher.loss, student.loss):
        share = percent(pruned.loss - student.loss, pruned.loss - teacher.loss, 0)
        what = "Distillation" if distilled else "Retraining"
        lost = fixed(pruned.loss - teacher.loss)
        on = f" on {count(student.tokens)} tokens" if student.tokens else ""
        found.append(f"{what}{on} recovered {share} of the {lost} nats that pruning cost.")
    others = (("cross-entropy", "retraining with cross-entropy"), ("scratch", "training the same shape from scratch"))
    for name, what in others:
        other = files.model(name)
        if distilled and other is not None and other.loss is not None:
            found.append(_compared(student, other, what))
    return found


def _compared(student: Model, other: Model, what: str) -> str:
    assert student.loss is not None and other.loss is not None
    tokens = "on the same tokens" if other.tokens == student.tokens else f"on {count(other.tokens)} tokens"
    gap = other.loss - student.loss
    if abs(gap) < 0.0005:
        return f"It ends level with {what} {tokens}."
    return f"It ends {fixed(abs(gap))} nats {'below' if gap > 0 else 'above'} {what} {tokens}."


def _row(model: Model, teacher: Model | None, tasks: Sequence[tuple[str, str]]) -> dict[str, Any]:
    reference = teacher.loss if teacher is not None else None
    whole = teacher.non_embedding if teacher is not None else None
    gap = (
        model.loss - reference if model.loss is not None and reference is not None and model.name != "teacher" else None
    )
    trained = model.name not in ("teacher", "pruned")
    cells = [
        count(model.params),
        percent(model.non_embedding, whole),
        count(model.tokens) if trained else NONE,
        fixed(model.loss),
        signed(gap),
        ratio(model.perplexity),
        fixed(model.bits_per_byte),
    ]
    cells += [fixed(model.tasks.get(task, {}).get(metric)) for task, metric in tasks]
    return {"name": model.name, "label": model.label, "cells": cells, "path": model.path}


def _note(files: RunFiles) -> str:
    """On what the losses were measured."""
    measured = next((files.result(f"eval/{model.name}") for model in files.models if model.loss is not None), {})
    if not measured:
        return ""
    tokens = f", {count(measured.get('tokens'))} tokens" if number(measured.get("tokens")) else ""
    split = next((files.config(f"eval/{model.name}").get("data_split") for model in files.models), None)
    return (
        f"Losses are in nats per token on the {split or 'validation'} split of the prepared data{tokens}; "
        "lower is better. "
        "Non-embedding counts leave out tensors with a vocabulary dimension and are shares of the teacher's."
    )
