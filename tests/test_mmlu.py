"""MMLU from CSV files: the harness's prompts, groups and numbers, without the network."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import SHARED
from helpers_eval import make_checkpoint, make_mmlu, question, questions
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.evaluate import harness
from minitron_cli.evaluate.harness import build_tasks, find_local, find_manager, leaf_configs, plain_metrics
from minitron_cli.evaluate.mmlu import find_folder, read_rows
from minitron_cli.evaluate.quiet import quiet_harness
from minitron_cli.evaluate.stage import EvalResult, run_eval

CATEGORIES = ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]


@pytest.fixture(scope="module")
def subjects() -> list[str]:
    configs = leaf_configs(find_manager(["mmlu"], local=True), "mmlu")
    return [cfg["dataset_name"] for cfg in configs.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, subjects: list[str]) -> Path:
    return make_mmlu(tmp_path_factory.mktemp("tasks") / "mmlu", subjects)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, folder: Path, checkpoint: Path) -> EvalResult:
    """One undisturbed run of all of MMLU."""
    return run_eval(config_for(checkpoint, folder, tmp_path_factory.mktemp("runs") / "whole"))


def config_for(checkpoint: Path, folder: Path, out: Path, **changes: Any) -> EvalConfig:
    values = {"tasks": "mmlu", "data_dir": folder.parent, "batch_size": 3, "device": "cpu", **changes}
    return EvalConfig(checkpoint=str(checkpoint), out=out, **values)


@pytest.fixture
def stock_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's data set as the harness loads it, holding the invented questions."""

    def load(path: str, name: str, **kwargs: Any) -> Any:
        assert path == "cais/mmlu" and not kwargs
        rows = {split: questions(name, split) for split in ("dev", "test")}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(items) for split, items in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)


def prompts(task: Any) -> list[tuple[str, str]]:
    """What the model will be asked, with 5 shots: (context, continuation) of every question and choice."""
    found = []
    for number, doc in enumerate(task.eval_docs):
        context = task.fewshot_context(doc, 5)
        requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, number, 1))
        found += [request.args for request in requests]
    return found


def test_prompts_are_the_harnesses_own(folder: Path, stock_data: None) -> None:
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    stock = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place)).load(["mmlu"])["tasks"]
    ours = build_tasks(["mmlu"], num_fewshot=None, local=find_local(["mmlu"], folder)).leaves
    assert list(ours) == list(stock) and len(ours) == 57
    for name, task in ours.items():
        assert type(task) is type(stock[name])
        assert prompts(task) == prompts(stock[name]), name
        assert len(prompts(task)) == (12 if name == "mmlu_anatomy" else 8)


def test_one_prompt_spelled_out(folder: Path) -> None:
    name = "mmlu_us_foreign_policy"
    task = build_tasks([name], num_fewshot=2, local=find_local([name], folder)).leaves[name]
    expected = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    for split, number in (("dev", 0), ("dev", 1), ("test", 0)):
        item = question("us_foreign_policy", split, number)
        expected += item["question"].strip() + "\n"
        expected += "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", item["choices"], strict=True))
        expected += "Answer:" if split == "test" else f"Answer: {'ABCD'[item['answer']]}\n\n"
    task.build_all_requests(limit=1)
    assert [request.args for request in task.instances] == [(expected, f" {letter}") for letter in "ABCD"]


def test_all_subjects_categories_and_the_total(result: EvalResult) -> None:
    leaves = [name for name in result.tasks if name not in result.groups]
    assert len(leaves) == 57
    assert list(result.tasks)[:2] == ["mmlu", "mmlu_stem"]
    assert result.groups["mmlu"] == CATEGORIES
    assert sorted(name for group in CATEGORIES for name in result.groups[group]) == sorted(leaves)
    for metrics in result.tasks.values():
        assert 0 <= metrics["acc"] <= 1 and metrics["acc_stderr"] >= 0
    for group, members in {**result.groups, "mmlu": leaves}.items():
        size = sum(result.tasks[name]["samples"] for name in members)
        right = sum(result.tasks[name]["acc"] * result.tasks[name]["samples"] for name in members)
        assert result.tasks[group]["samples"] == size
        assert result.tasks[group]["acc"] == pytest.approx(right / size)
    assert result.tasks["mmlu"]["samples"] == 57 * 2 + 1
    assert len({metrics["acc"] for metrics in result.tasks.values()}) > 5  # the model does not answer all alike


def test_numbers_are_the_harnesses_own(checkpoint: Path, result: EvalResult, stock_data: None) -> None:
    """Stock tasks, stock model class, all tasks in one call."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet_harness():
        loaded = find_manager(["mmlu"], local=True).load(["mmlu"])
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", 5)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=4)
        stock = evaluate(lm=lm, task_dict=loaded, log_samples=False)["results"]
    assert stock.keys() == result.tasks.keys()
    for name, metrics in stock.items():
        assert plain_metrics(metrics) == pytest.approx(result.tasks[name]), name


def test_scores_are_the_stock_model_classes(checkpoint: Path) -> None:
    """Continuations of one and of several tokens, shared, empty and overlong contexts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from minitron_cli.evaluate.adapters import LanguageModel

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    model.config.max_position_embeddings = 40
    greedy = tokenizer.decode(int(model(torch.tensor([tokenizer.encode("ab c")])).logits[0, -1].argmax()))
    pairs = [
        ("ab c", " A"),
        ("ab c", " B"),
        ("ab c", greedy),
        ("", "xyz"),
        ("x" * 70, " long"),
        ("q", " a b c"),
        ("q", " a b"),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    shares: list[float] = []
    with quiet_harness():
        ours = LanguageModel(model, tokenizer, batch_size=3, answered=lambda done, total: shares.append(done / total))
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        found, expected = ours.loglikelihood(requests), stock.loglikelihood(requests)
        text = [Instance("loglikelihood_rolling", {}, ("some text " * 12,), 0)]
        assert ours.loglikelihood_rolling(text) == pytest.approx(stock.loglikelihood_rolling(text), rel=1e-5)
    for (score, is_greedy), (stock_score, stock_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(stock_score, rel=1e-5)
        assert is_greedy == stock_greedy
    assert [is_greedy for _, is_greedy in found].count(True) >= 1
    assert ours.truncated == 1 and shares[-1] == 1.0 and shares == sorted(shares)


def test_a_killed_run_continues_to_the_same_bytes(
    tmp_path: Path, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = harness._measure, []

    def failing(lm: Any, name: str, *args: Any) -> Any:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(name)
        return measure(lm, name, *args)

    undisturbed = config_for(checkpoint, folder, tmp_path / "undisturbed", tasks="mmlu_humanities")
    expected = run_eval(undisturbed)
    monkeypatch.setattr(harness, "_measure", failing)
    config = config_for(checkpoint, folder, tmp_path / "out", tasks="mmlu_humanities")
    with pytest.raises(KeyboardInterrupt):
        run_eval(config)
    assert not config.out.exists()
    monkeypatch.setattr(harness, "_measure", lambda lm, name, *rest: (seen.append(name), measure(lm, name, *rest))[1])
    assert run_eval(config).tasks == expected.tasks
    assert len(seen) == 13 == len(set(seen))  # nothing twice
    assert (config.out / "results.json").read_bytes() == (undisturbed.out / "results.json").read_bytes()


def test_limit_and_parts_of_mmlu(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    config = config_for(checkpoint, folder, tmp_path / "out", tasks="mmlu_humanities,mmlu_anatomy", limit=1)
    tasks = run_eval(config).tasks
    assert next(iter(tasks)) == "mmlu_humanities" and "mmlu_anatomy" in tasks and len(tasks) == 1 + 13 + 1
    assert tasks["mmlu_humanities"]["samples"] == 13 and tasks["mmlu_anatomy"]["samples"] == 1
    assert "acc_stderr" not in tasks["mmlu_anatomy"]  # one question has none


def test_no_network_and_no_traces(
    tmp_path: Path, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    from tqdm.std import tqdm

    logger = logging.getLogger("lm_eval")
    before = dict(os.environ), logger.level, tqdm.__init__, torch.get_rng_state().tolist()
    capfd.readouterr()
    run_eval(config_for(checkpoint, folder, tmp_path / "out", tasks="mmlu_virology"))
    assert (dict(os.environ), logger.level, tqdm.__init__, torch.get_rng_state().tolist()) == before
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if "Loading weights" not in line]
    assert shown.out == "" and len(lines) == 1 and lines[0].startswith("tasks  2/2 questions")


def test_what_the_harness_sets_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("lm_eval")
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.delenv("ADDED", raising=False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    with pytest.raises(RuntimeError), quiet_harness():
        os.environ |= {"KEPT": "new", "ADDED": "1"}
        assert logger.level == logging.ERROR
        raise RuntimeError
    assert os.environ["KEPT"] == "old" and "ADDED" not in os.environ
    assert logger.level == logging.INFO


def refused(tmp_path: Path, checkpoint: Path, folder: Path, error: type[Exception], **changes: Any) -> str:
    """The sentence of a refusal; nothing may have been written."""
    with pytest.raises(error) as caught:
        run_eval(config_for(checkpoint, folder, tmp_path / "out", **changes))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


def test_wrong_requests(tmp_path: Path, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(error: type[Exception], **changes: Any) -> str:
        return refused(tmp_path, checkpoint, folder, error, **changes)

    many = refusal(ConfigError, num_fewshot=6)
    assert "6: task 'mmlu_abstract_algebra' can show at most 5 solved examples in --data-dir" in many
    assert "mmlu_anatomy" in refusal(ConfigError, tasks="mmlu_anatmy")
    assert "'arc_challenge_chat'" in refusal(ConfigError, tasks="mmlu,arc_challenge_chat")
    assert "no file for arc_easy" in refusal(InputError, tasks="mmlu,arc_easy")
    assert "does not hold MMLU" in refusal(InputError, data_dir=tmp_path)
    manager = find_manager(["mmlu"], local=True)
    monkeypatch.setattr(harness, "_manager", lambda folders: manager)  # the index of everything takes 10 seconds
    assert "no task 'mmlu_virolgy' (did you mean mmlu_virology" in refusal(
        ConfigError, tasks="mmlu_virolgy", data_dir=None
    )

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(InputError, tasks="mmlu_virology", data_dir=None)
    assert "'mmlu_virology'" in message and "Couldn't reach" in message and "--data-dir" in message


def test_missing_and_damaged_files(tmp_path: Path, folder: Path, checkpoint: Path, subjects: list[str]) -> None:
    copy = make_mmlu(tmp_path / "tasks", subjects)
    assert find_folder(copy) == copy and find_folder(folder.parent) == folder
    (copy / "dev" / "anatomy_dev.csv").unlink()
    (copy / "test" / "virology_test.csv").unlink()
    message = refused(tmp_path, checkpoint, folder, InputError, data_dir=copy)
    missing = message.split("lacks ")[1].split(";")[0].split(", ")
    assert sorted(missing) == ["dev/anatomy_dev.csv", "test/virology_test.csv"]
    damaged = copy / "test" / "sociology_test.csv"
    for content, expected in [
        (b"q,a,b,c,d,E\n", "row 1: expected question"),
        (b"q,a,b,c,d,A\nq,a,b,c,A\n", "row 2: expected"),
        (b"", "has no rows"),
        (b"\xff,a,b,c,d,A\n", "not a UTF-8"),
    ]:
        damaged.write_bytes(content)
        with pytest.raises(InputError, match=expected):
            read_rows(damaged)
    message = refused(tmp_path, checkpoint, folder, InputError, data_dir=copy, tasks="mmlu_sociology")
    assert str(damaged) in message


@pytest.mark.shared_data
def test_real_questions_and_a_real_model(tmp_path: Path) -> None:
    config = EvalConfig(
        checkpoint=str(SHARED / "models" / "stories260K"), tasks=("mmlu",), data_dir=SHARED / "mmlu", limit=2,
        out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    result = run_eval(config)
    assert result.tasks["mmlu"]["samples"] == 114 and len(result.tasks) == 57 + 4 + 1
    stored = json.loads((config.out / "results.json").read_text())
    assert stored["tasks"] == result.tasks
