"""Tasks from files: the harness's own prompts, what is missing, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import SHARED
from helpers_eval import make_checkpoint

from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.evaluate.harness import build_tasks, find_local, find_manager
from minitron_cli.evaluate.local import FORMS
from minitron_cli.evaluate.quiet import quiet_harness
from minitron_cli.evaluate.stage import run_eval
from minitron_cli.evaluate.table import format_eval

LETTERS = ["A", "B", "C"]
ROWS: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "arc_easy": (
        "test",
        [
            {"question": "Why \n{{so}}?", "choices": {"text": [" a", "b ", "c"], "label": LETTERS}, "answerKey": "B"},
            {"question": "Question: x\nAnswer:", "choices": {"text": ["d", "e"], "label": [*"12"]}, "answerKey": "1"},
        ],
        [
            {"id": "1", "query": "Question: Why \n{{so}}?\nAnswer:", "choices": [" a", "b ", "c"], "gold": 1},
            {"id": "2", "query": "Question: Question: x\nAnswer:\nAnswer:", "choices": ["d", "e"], "gold": 0},
        ],
    ),
    "hellaswag": (
        "validation",
        [
            {
                "ind": 3, "activity_label": "Cooking: soup", "ctx_a": "A man [step] boils  water.", "ctx_b": "he",
                "endings": [" eats [x] it.", "sings.", "goes [title] home", "sits"], "label": "2",
            }
        ],
        [
            {
                "ind": 3, "query": "Cooking: soup: A man boils water. He",
                "choices": ["eats it.", " sings.", "goes. home", "sits"], "gold": 2,
            }
        ],
    ),
    "piqa": ("validation", [{"goal": "Open", "sol1": "pull", "sol2": "push", "label": 1}], []),
    "winogrande": (
        "validation",
        [{"sentence": "Ann met Bo because _ was late.", "option1": "Ann", "option2": "Bo", "answer": "2"}],
        [],
    ),
    "openbookqa": (
        "test",
        [{"question_stem": "Sun", "choices": {"text": ["hot", "wet"], "label": ["A", "B"]}, "answerKey": "A"}],
        [],
    ),
    "boolq": (
        "validation",
        [{"question": "is it", "passage": "It is.", "idx": 0, "label": 1}],
        [{"question": "is it", "passage": "It is.", "answer": True}],
    ),
    "blimp_adjunct_island": ("train", [{"sentence_good": "Who left?", "sentence_bad": "Left who?", "UID": "x"}], []),
}  # fmt: skip
"""Split, rows as the Hub has them, the same in the other form that files may have (empty: there is none)."""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts(task: Any) -> list[Any]:
    with quiet_harness():
        task.build_all_requests()
        return [request.args for request in task.instances]


def place(folder: Path, task: str) -> Path:
    """The task's file without a split in its name."""
    return folder / (f"blimp/{task.removeprefix('blimp_')}.jsonl" if task.startswith("blimp_") else f"{task}.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("task", list(ROWS))
def test_prompts_are_those_of_the_stock_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, rows, others = ROWS[task]

    def load(*args: Any, **kwargs: Any) -> Any:
        names = {"train", "validation", "test"}
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in names})

    monkeypatch.setattr(datasets, "load_dataset", load)
    with quiet_harness():
        stock = find_manager([task], local=False).load([task])["tasks"][task]
    expected = prompts(stock)
    assert len(expected) >= 2
    for form in filter(None, (rows, others)):
        write(place(tmp_path, task), form)
        ours = build_tasks([task], num_fewshot=None, local=find_local([task], tmp_path)).leaves[task]
        assert type(ours) is type(stock)
        assert prompts(ours) == expected
        assert [ours.doc_to_target(doc) for doc in ours.eval_docs] == [
            stock.doc_to_target(doc) for doc in stock.eval_docs
        ]
    assert split in ("train", ours.config.test_split, ours.config.validation_split)


def test_a_training_file_gives_solved_examples(tmp_path: Path) -> None:
    rows = [{"goal": f"Goal {number}", "sol1": "yes", "sol2": "no", "label": 0} for number in range(4)]
    write(tmp_path / "piqa__validation.jsonl", rows[:1])
    write(tmp_path / "piqa_train.jsonl", rows[1:])
    task = build_tasks(["piqa"], num_fewshot=2, local=find_local(["piqa"], tmp_path)).leaves["piqa"]
    context = prompts(task)[0][0]
    assert context.count("Answer: yes") == 2 and context.endswith("Question: Goal 0\nAnswer:")
    with pytest.raises(
        ConfigError, match="--num-fewshot 3: task 'piqa' can show at most 2 solved examples in --data-dir"
    ):
        build_tasks(["piqa"], num_fewshot=3, local=find_local(["piqa"], tmp_path))
    (tmp_path / "piqa_train.jsonl").unlink()
    with pytest.raises(ConfigError, match="has no solved examples to show in --data-dir"):
        build_tasks(["piqa"], num_fewshot=1, local=find_local(["piqa"], tmp_path))


def test_parts_of_a_group_are_averaged_and_said(checkpoint: Path, tmp_path: Path) -> None:
    pairs = [{"sentence_good": f"{number} is good", "sentence_bad": "no"} for number in range(3)]
    for name in ("adjunct_island", "npi_present_1", "npi_present_2"):
        write(tmp_path / "d" / "evals" / "blimp" / f"{name}.jsonl", pairs)
    config = EvalConfig(
        checkpoint=str(checkpoint), tasks=("blimp",), data_dir=tmp_path / "d", out=tmp_path / "o", device="cpu"
    )
    result = run_eval(config)
    members = ["blimp_adjunct_island", "blimp_npi_present_1", "blimp_npi_present_2"]
    assert list(result.tasks) == ["blimp", *members] and result.groups == {"blimp": members}
    mean = sum(result.tasks[name]["acc"] for name in members) / 3
    assert result.tasks["blimp"]["acc"] == pytest.approx(mean)
    assert result.notes["blimp"] == "the average of 3 of its 67 tasks"
    assert result.notes["blimp_npi_present_1"] == "3 of its 1,000 questions"
    assert "blimp: the average of 3 of its 67 tasks" in format_eval(result)
    assert json.loads((tmp_path / "o" / "results.json").read_text())["notes"] == result.notes


def test_another_split_is_said(tmp_path: Path) -> None:
    write(tmp_path / "openbookqa__main__validation.jsonl", ROWS["openbookqa"][1])
    local = find_local(["openbookqa"], tmp_path)
    assert "validation" in local.notes["openbookqa"]
    assert len(build_tasks(["openbookqa"], num_fewshot=None, local=local).leaves["openbookqa"].eval_docs) == 1


@pytest.mark.parametrize(
    ("files", "tasks", "message"),
    [
        ({}, ["piqa"], "no file for piqa; put its questions at piqa.jsonl"),
        ({}, ["blimp"], "at blimp/adjunct_island.jsonl"),
        ({"arc_easy.jsonl": "{}"}, ["ai2_arc"], "no file for arc_challenge"),
        ({"piqa.jsonl": "{}", "piqa__validation.jsonl": "{}"}, ["piqa"], "both the validation split"),
    ],
)
def test_missing_files(files: dict[str, str], tasks: list[str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        find_local(tasks, tmp_path)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("piqa", '{"goal": "x"}', "line 1: expected the columns goal, sol1, sol2, label"),
        ("piqa", '\n[1]', "line 2: expected the columns"),
        ("piqa", "{", "line 1: Expecting"),
        ("piqa", "\n", "has no rows"),
        ("arc_easy", '{"query": "Why?", "choices": ["a"], "gold": 0}', "a query like"),
        ("arc_easy", '{"query": "Question: Why?\\nAnswer:", "choices": ["a"], "gold": 4}', "line 1: list index"),
        ("hellaswag", '{"query": "Why?", "choices": ["a"], "gold": 0}', "a query like"),
    ],
)  # fmt: skip
def test_damaged_files(task: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{task}.jsonl").write_text(text)
    local = find_local([task], tmp_path)
    with pytest.raises(InputError, match=message):
        build_tasks([task], num_fewshot=None, local=local)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        find_local(["piqa"], tmp_path / "absent")


@pytest.mark.shared_data
def test_real_files_are_the_requests_they_came_from() -> None:
    """Files whose rows hold the finished prompt: the harness must make the same one again."""
    names = ["arc_easy", "arc_challenge", "hellaswag"]
    tasks = build_tasks(names, num_fewshot=None, local=find_local(names, SHARED)).leaves
    for name, file in zip(names, ("arc_easy__test", "arc_challenge__test", "hellaswag__val_1000_subset"), strict=True):
        rows = [json.loads(line) for line in (SHARED / "evals" / f"{file}.jsonl").open(encoding="utf-8")]
        wanted = [(row["query"], f" {choice.strip()}") for row in rows for choice in row["choices"]]
        found = [(context, choice) for context, choice in prompts(tasks[name])]
        assert [context for context, _ in found] == [context for context, _ in wanted], name
        assert [choice.strip() for _, choice in found] == [choice.strip() for _, choice in wanted], name


@pytest.mark.shared_data
def test_every_local_task_has_its_real_file() -> None:
    names = [*FORMS, "blimp"]
    local = find_local(names, SHARED)
    assert set(FORMS) <= local.files.keys()
    assert local.notes["blimp"] == "the average of 40 of its 67 tasks"
    assert local.notes["hellaswag"] == "1,000 of its 10,042 questions"
    assert not {"arc_easy", "piqa", "boolq", "winogrande"} & local.notes.keys()
