"""`eval --against`, `--log-samples`, `--chat-template`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_eval import byte_tokenizer, make_checkpoint, make_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.evaluate.harness import find_manager
from minitron_cli.evaluate.quiet import quiet_harness
from minitron_cli.evaluate.stage import EvalResult, retention, run_eval
from minitron_cli.evaluate.table import format_eval

TASK = "piqa"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models of one tokenizer, invented questions, prepared data."""
    root = tmp_path_factory.mktemp("compare")
    rows = [{"goal": f"g{n}", "sol1": "abc" * n, "sol2": "cab" * n, "label": n % 2} for n in range(1, 8)]
    questions = root / "questions"
    questions.mkdir()
    (questions / f"{TASK}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (questions / f"{TASK}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    return {
        "checkpoint": str(make_checkpoint(root / "small", seed=1)),
        "against": (str(make_checkpoint(root / "large", seed=2)),),
        "data_dir": questions,
        "data": make_data(root / "data"),
        "root": root,
    }


def config(world: dict[str, Any], out: str, **changes: Any) -> EvalConfig:
    given = {key: value for key, value in world.items() if key != "root"}
    return EvalConfig(**{**given, "tasks": (TASK,), "out": world["root"] / out, "device": "cpu", **changes})


def test_each_is_measured_as_if_alone(world: dict[str, Any]) -> None:
    both = run_eval(config(world, "both"))
    ours = run_eval(config(world, "ours", against=()))
    theirs = run_eval(config(world, "theirs", checkpoint=world["against"][0], against=()))
    assert (both.tasks, both.loss, both.against[0]["loss"]) == (ours.tasks, ours.loss, theirs.loss)
    assert both.against[0]["tasks"] == theirs.tasks and both.loss != theirs.loss
    kept = both.against[0]["retention"]
    assert kept["bits_per_byte"] == pytest.approx(ours.bits_per_byte / theirs.bits_per_byte)  # type: ignore[operator]
    assert kept["tasks"][TASK].keys() == {"acc", "acc_norm"}
    table = format_eval(EvalResult(**json.loads(json.dumps(both.to_json())))).splitlines()
    assert table[0].startswith("perplexity") and "x " in table[1] and table[1].count("large") == 1
    assert table[3].split()[-2:] == ["large", "kept"]
    assert all(len(line) == len(table[4]) for line in table[5:6])


def test_retention_of_nothing_is_unknown() -> None:
    ours = {"perplexity": None, "bits_per_byte": None, "tasks": {"t": {"acc": 0.5, "acc_stderr": 0.1, "samples": 4}}}
    theirs = {"perplexity": None, "bits_per_byte": None, "tasks": {"t": {"acc": 0.0, "acc_stderr": 0.1, "samples": 4}}}
    assert retention(ours, theirs) == {"tasks": {"t": {"acc": None}}}


def test_a_kill_between_the_models_loses_nothing(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_eval(config(world, "whole"))
    from minitron_cli.evaluate import reading, stage

    loaded: list[str] = []
    load = stage.load_model

    def failing(path: Path, **kwargs: Any) -> Any:
        loaded.append(path.name)
        if path.name == "large" and len(loaded) == 2:
            raise KeyboardInterrupt
        return load(path, **kwargs)

    monkeypatch.setattr(stage, "load_model", failing)
    with pytest.raises(KeyboardInterrupt):
        run_eval(config(world, "stopped"))
    monkeypatch.setattr(reading, "evaluate_split", _only_once())
    again = run_eval(config(world, "stopped"))
    assert again.tasks == whole.tasks and again.against == whole.against


def _only_once() -> Any:
    from minitron_cli.evaluate.perplexity import evaluate_split

    calls: list[int] = []

    def measure(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert len(calls) == 1, "the first model's losses were measured again"
        return evaluate_split(*args, **kwargs)

    return measure


def test_samples_are_the_harnesses_question_by_question(world: dict[str, Any]) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from minitron_cli.evaluate.harness import build_tasks, find_local

    out = run_eval(config(world, "samples", log_samples=True, num_fewshot=1)).out
    ours = [json.loads(line) for line in (Path(out) / "samples" / f"{TASK}.jsonl").open(encoding="utf-8")]
    theirs = [json.loads(line) for line in (Path(out) / "samples/against-1" / f"{TASK}.jsonl").open(encoding="utf-8")]
    assert len(ours) == len(theirs) == 7 and ours != theirs
    with quiet_harness():
        tasks = build_tasks([TASK], num_fewshot=1, local=find_local([TASK], world["data_dir"]))
        model = AutoModelForCausalLM.from_pretrained(world["checkpoint"])
        lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(world["checkpoint"]), batch_size=4)
        stock = evaluate(lm=lm, task_dict={"tasks": tasks.leaves, "groups": {}}, log_samples=True)["samples"][TASK]
    for mine, other in zip(ours, sorted(stock, key=lambda row: row["doc_id"]), strict=True):
        assert mine["arguments"] == json.loads(json.dumps(other["arguments"]))
        assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])
        found = [float(answer[0]) for answer in mine["filtered_resps"]]
        assert found == pytest.approx([float(answer[0]) for answer in other["filtered_resps"]], abs=1e-4)


def test_chat_template(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template; leave out --chat-template"):
        run_eval(config(world, "chat", chat_template=True))
    chatty = make_checkpoint(tmp_path / "chatty", seed=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    settings = {"checkpoint": str(chatty), "against": (), "log_samples": True, "num_fewshot": 1, "data": None}
    result = run_eval(config(world, "chatty", chat_template=True, **settings))
    row = json.loads((Path(result.out) / "samples" / f"{TASK}.jsonl").open(encoding="utf-8").readline())
    context = row["arguments"][0][0]
    assert context.startswith("<user>") and context.endswith("<assistant>") and context.count("<assistant>") == 2


def test_options_about_tasks_need_tasks() -> None:
    for option in ({"log_samples": True}, {"chat_template": True}):
        with pytest.raises(ConfigError, match="is about tasks"):
            EvalConfig(checkpoint="c", out=Path("o"), data=Path("d"), **option)


def test_every_name_of_a_local_task_is_known() -> None:
    manager = find_manager(["ai2_arc", "blimp", "mmlu_stem"], local=True)
    assert {"arc_easy", "boolq", "winogrande"} <= set(manager.task_index)
