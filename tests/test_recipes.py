"""Every shipped recipe: its keys are right, its stages fit together, and it ends with a smaller model that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minitron_cli.config.recipe import Recipe, load_recipe, shipped
from minitron_cli.config.run import RunConfig
from minitron_cli.errors import ConfigError
from minitron_cli.stages import format_run, plan_recipe, run_recipe

STAGES = {
    "align-quickstart": ["data", "importance", "search", "pruned", "student", "aligned"],
    "quickstart": ["data", "importance", "search", "pruned", "student", "cross-entropy", "scratch", "bench"],
    "quickstart-teacher": ["data", "student"],
    "width": ["data", "importance", "pruned", "student"],
    "depth": ["data", "importance", "pruned", "student"],
    "two-stage": ["data", "round-1-importance", "round-1-pruned", "round-1-student", "importance", "pruned", "student"],
    "corrected": ["data", "corrected", "importance", "pruned", "student"],
}
TRAINING = ("steps=2", "tokens=null", "batch_size=2", "eval_sequences=2", "warmup=0")
SMALL = {
    "importance": ("samples=4", "batch_size=2"),
    "search": ("candidates=2", "finalists=1", "rungs=1", "steps=1", "batch_size=2", "eval_sequences=2"),
    "distill": TRAINING,
    "correct": TRAINING,
    "align": ("reward=length:30", "steps=2", "batch_size=2", "k=2", "n=2", "max_new_tokens=4", "eval_samples=8"),
    "eval": ("batch_size=2", "max_sequences=2"),
    "bench": ("batch_size=[1]", "context=[8]", "rounds=1", "new_tokens=2"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "code.txt"
    lines = (
        f"def function_{number}(first, second):\n    return first * {number} + second\n\n" for number in range(400)
    )
    path.write_text("".join(lines))
    return path


def smaller(recipe: Recipe, corpus: Path) -> tuple[str, ...]:
    """Changes that make a recipe run in seconds, for every section it has."""
    changes = [f"data.sources=[{corpus}]", "data.seq_len=32", "data.max_tokens=null", "data.validation=0.1"]
    for name, settings in SMALL.items():
        if getattr(recipe, name) is not None:
            changes += [f"{name}.{setting}" for setting in settings]
        for number, sections in enumerate(recipe.then):
            if name in sections:
                changes += [f"then.{number}.{name}.{setting}" for setting in settings]
    if recipe.importance and recipe.importance.get("loss_samples"):
        changes.append("importance.loss_samples=2")
    return tuple(changes)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "minitron.json").read_text())["config"]
    return found


def test_every_recipe_is_known_here() -> None:
    assert shipped().keys() == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_dry_run(name: str, tmp_path: Path) -> None:
    plan = plan_recipe(RunConfig(recipe=name, out=tmp_path / "run"))
    assert [stage for stage in plan["stages"] if not stage.startswith("eval/")] == STAGES[name]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", STAGES)
def test_recipe_says_how_to_scale(name: str) -> None:
    """The numbers of the paper stand at the top of the file, in keys that the sections have."""
    head, recipe = shipped()[name].split("\nname:")[0], load_recipe(name)
    assert recipe.description
    if "quickstart" not in name:
        assert all(word in head for word in ("8192", "94", "batch_size", "warmup", "min_lr", "teacher"))


@pytest.mark.parametrize("name", STAGES)
def test_recipe_runs(name: str, corpus: Path, tmp_path: Path) -> None:
    changes = smaller(load_recipe(name), corpus)
    config = RunConfig(recipe=name, out=tmp_path, set=changes)
    result = run_recipe(config)
    rows = {row["name"]: row for row in result.models}
    assert rows["teacher"]["loss"] and rows["student"]["loss"] and (tmp_path / "report.html").exists()
    student = AutoModelForCausalLM.from_pretrained(result.student)
    assert sum(p.numel() for p in student.parameters()) == rows["student"]["params"]
    assert (rows["student"]["params"] < rows["teacher"]["params"]) == (name != "quickstart-teacher")
    assert "student" in format_run(result.to_json())
    if name in ("two-stage", "corrected"):
        assert {stage["status"] for stage in run_recipe(config).stages} == {"up to date"}
    check_wiring(name, tmp_path, rows)


def check_wiring(name: str, out: Path, rows: dict[str, Any]) -> None:
    """Who was cut, and who taught."""
    if name == "two-stage":
        first, last = config_of(out / "round-1-student"), config_of(out / "student")
        assert first["teacher"] == last["teacher"] == "builtin:tiny-py", "the original one teaches both"
        assert config_of(out / "importance")["checkpoint"] == str(out / "round-1-student")
        assert config_of(out / "pruned")["checkpoint"] == str(out / "round-1-student")
        assert (first["student"], last["student"]) == (str(out / "round-1-pruned"), str(out / "pruned"))
        sizes = [rows[each]["params"] for each in ("teacher", "round-1-student", "student")]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        assert rows["student"]["tokens"] == 2 * rows["round-1-student"]["tokens"] > 0
        assert rows["round-1-student"]["label"] == "distilled 1"
    if name == "corrected":
        assert config_of(out / "corrected")["teacher"] == "builtin:tiny-py"
        for stage, key in (("importance", "checkpoint"), ("pruned", "checkpoint"), ("student", "teacher")):
            assert config_of(out / stage)[key] == str(out / "corrected")
        assert rows["corrected"]["params"] == rows["teacher"]["params"]
        assert rows["corrected"]["loss"] != rows["teacher"]["loss"]
    if name == "depth":
        assert config_of(out / "student")["states"] == ["embeddings", "blocks"]
        assert rows["student"]["shape"]["layers"] == 4 and rows["teacher"]["shape"]["layers"] == 6


def test_training_on_text_of_its_own(corpus: Path, tmp_path: Path) -> None:
    """A section may name text to stream; validation stays with the prepared data."""
    changes = smaller(load_recipe("width"), corpus)
    streamed = (f"distill.data={corpus}", "distill.seq_len=16", "eval=null")
    result = run_recipe(RunConfig(recipe="width", out=tmp_path, set=(*changes, *streamed)))
    assert {row["name"]: row["tokens"] for row in result.models}["student"] == 2 * 2 * 16
    found = config_of(tmp_path / "student")
    assert (found["data"], found["val_data"]) == (str(corpus), str(tmp_path / "data"))


ROUND: dict[str, Any] = {"prune": {"ffn": 8}, "distill": {"steps": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"then": [{**ROUND, "prunes": {}}]}, r"Unknown key 'then\.0\.prunes'; did you mean 'prune'\?"),
        ({"then": [ROUND, {"prune": {"fnn": 8}, "distill": {"steps": 1}}]}, r"'then\.1\.prune\.fnn'"),
        ({"then": [{"prune": {"ffn": 8}}]}, r"then\.0\.distill is required"),
        ({"then": [{**ROUND, "search": {"params": "50%"}}]}, r"then\.0\.search: .*not both"),
        ({"then": [{"search": {"params": "50%"}, "distill": {"steps": 1}}]}, r"then\.0\.search: .*importance section"),
        ({"then": [{**ROUND, "distill": {"steps": 0}}]}, r"then\.0\.distill: --steps"),
        ({"then": [ROUND], "baselines": ["scratch"]}, "leave out `baselines` or `then`"),
        ({"correct": {"steps": 1, "loss": "kl"}}, r"Unknown key 'correct\.loss'"),
        ({"correct": {"steps": 1, "teacher": "x"}}, r"Unknown key 'correct\.teacher'"),
        ({"correct": {}}, "--steps or --tokens"),
        ({"distill": {"steps": 1, "seq_len": 8}}, r"distill\.seq_len goes with distill\.data"),
    ],
)
def test_wrong_rounds_name_the_key(changes: dict[str, Any], message: str) -> None:
    values = {"name": "n", "teacher": "t", "data": {"sources": ["text"]}, **ROUND, **changes}
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("then.1.distill.steps=3", "none of the places 0 to 0"),
        ("then.x.distill.steps=3", "none of the places"),
        ("then.0=3", "no key of a section"),
        ("then.0.distill.steps.x=3", "holds a value"),
    ],
)
def test_wrong_changes_of_a_round(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("two-stage", (change,))


def test_a_change_reaches_one_round() -> None:
    recipe = load_recipe("two-stage", ("then.0.distill.steps=3",))
    assert recipe.then[0]["distill"]["steps"] == 3
    assert recipe.distill is not None and recipe.distill["steps"] != 3, "what YAML shares stays with the other round"
