"""Recipes, the chain, compress: everything shipped loads, everything runs, a second run does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_chain import make_checkpoint
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.recipe import load_recipe, shipped
from minitron_cli.config.run import CompressConfig, RunConfig
from minitron_cli.errors import ConfigError, InputError, OutputError
from minitron_cli.stages import compress_recipe, format_run, plan_recipe, run_compress, run_recipe

TEXT = "the quick brown fox jumps over the lazy dog and then it rests below the tree.\n\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A chain of seconds: every stage, both baselines."""
    teacher = make_checkpoint(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} {TEXT}" for number in range(400)))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
name: small
teacher: {teacher}
data: {{sources: [{text}], seq_len: 16, validation: 0.1}}
importance: {{samples: 8, loss_samples: 4}}
search: {{params: 70%, tolerance: 15%, grid: ["hidden=24,36", "ffn=32,56"], finalists: 1, rungs: 2, steps: 2,
         batch_size: 4, candidates: 2, eval_sequences: 4}}
distill: {{steps: 3, batch_size: 4}}
baselines: [cross-entropy, scratch]
eval: {{batch_size: 4, max_sequences: 8}}
"""
    )
    return file


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description


def test_quickstart_is_shipped() -> None:
    assert {"quickstart", "quickstart-teacher"} <= shipped().keys()


def test_the_whole_chain_and_its_second_run(recipe: Path, tmp_path: Path) -> None:
    config = RunConfig(recipe=str(recipe), out=tmp_path / "run")
    result = run_recipe(config)
    assert [row["name"] for row in result.models] == ["teacher", "pruned", "student", "cross-entropy", "scratch"]
    assert all(stage["status"] == "done" for stage in result.stages)
    for row in result.models[1:]:
        assert row["params"] == Checkpoint(Path(row["path"])).shape.params < result.models[0]["params"]
        AutoModelForCausalLM.from_pretrained(row["path"])
    tokens = {row["tokens"] for row in result.models[2:]}
    assert tokens == {3 * 4 * 16}
    assert "from scratch" in format_run(result.to_json())
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = run_recipe(config)
    assert all(stage["status"] == "up to date" for stage in again.stages)
    assert again.models == result.models
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"recipe.json"}, "a second run rewrites nothing that was computed"


def test_a_changed_recipe_is_refused_without_force(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("search=null", "baselines=[]", "eval=null", "prune.ffn=32")
    run_recipe(RunConfig(recipe=str(recipe), out=out, set=small))
    changed = (*small, "distill.steps=4")
    with pytest.raises(OutputError, match="--force"):
        run_recipe(RunConfig(recipe=str(recipe), out=out, set=changed))
    result = run_recipe(RunConfig(recipe=str(recipe), out=out, set=changed, force=True))
    assert {stage["name"]: stage["status"] for stage in result.stages}["importance"] == "up to date"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.stepz=4", "'distill.stepz'; did you mean 'steps'"),
        ("distil.steps=4", "did you mean 'distill'"),
        ("distill.steps=-4", "steps"),
        ("distill.out=x", "distill.out"),
        ("prune.hidden=24", "search section or a prune section"),
        ("no-equals-sign", "section.key=value"),
    ],
)
def test_bad_recipes_name_the_key(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_recipe(str(recipe), (change,))


def test_unknown_recipe_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load_recipe("quikstart")
    (tmp_path / "bad.yaml").write_text("name: [unclosed\nteacher: x")
    with pytest.raises(ConfigError, match="not valid YAML at line"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_foreign_directory_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a minitron run"):
        run_recipe(RunConfig(recipe=str(recipe), out=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    plan = plan_recipe(RunConfig(recipe=str(recipe), out=tmp_path / "run"))
    assert plan["stages"][:4] == ["data", "importance", "search", "pruned"]
    assert not (tmp_path / "run").exists()


def test_compress_runs_the_chain(tmp_path: Path) -> None:
    """Defaults scale to the checkpoint; a tiny budget of tokens keeps the test short."""
    teacher = make_checkpoint(tmp_path / "teacher", hidden_size=96, intermediate_size=256, num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} {TEXT}" for number in range(600)))
    config = CompressConfig(
        checkpoint=str(teacher),
        params="60%",
        data=(str(text),),
        out=tmp_path / "run",
        tokens=512,
        seq_len=16,
        batch_size=8,
    )
    assert compress_recipe(config).distill["steps"] == 4
    result = run_compress(config)
    teacher_row, student = result.models[0], result.models[-1]
    assert abs(student["params"] / teacher_row["params"] - 0.6) <= 0.031
    assert json.loads((tmp_path / "run" / "run.json").read_text())["student"].endswith("student")


def test_a_wrong_source_leaves_nothing(tmp_path: Path) -> None:
    teacher = make_checkpoint(tmp_path / "teacher")
    config = CompressConfig(checkpoint=str(teacher), params="50%", data=("./nothing",), out=tmp_path / "deep" / "run")
    with pytest.raises(InputError, match="does not exist"):
        run_compress(config)
    assert not (tmp_path / "deep" / "run").exists()
