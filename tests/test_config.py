"""Configurations: defaults hold, unknown keys and bad values are one clear sentence, combinations are checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from minitron_cli.config.align import AlignConfig
from minitron_cli.config.audit import AuditConfig, RobotsFetchConfig, RobotsImportConfig, TermsConfig
from minitron_cli.config.base import StageConfig
from minitron_cli.config.bench import BenchConfig
from minitron_cli.config.convert import ConvertConfig
from minitron_cli.config.correct import CorrectConfig
from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import DistillConfig, OptimizerConfig, TextConfig, TrainingConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.plan import PlanConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.config.recipe import Recipe, load_recipe, shipped
from minitron_cli.config.report import ReportConfig
from minitron_cli.config.run import CompressConfig, RunConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.config.sharding import ShardingConfig
from minitron_cli.errors import ConfigError

NEEDED: dict[type[StageConfig], dict[str, Any]] = {
    AuditConfig: {"source": "c.jsonl", "robots": Path("r"), "out": Path("o")},
    RobotsFetchConfig: {"corpus": "c.jsonl", "out": Path("o")},
    RobotsImportConfig: {"path": Path("p"), "out": Path("o")},
    AlignConfig: {"policy": "p", "reward": "length:40", "prompts": Path("p"), "steps": 1, "out": Path("o")},
    TermsConfig: {"pages": Path("p"), "judge": "m:f", "out": Path("o")},
    BenchConfig: {"checkpoint": "ckpt"},
    ConvertConfig: {"checkpoint": "a", "out": Path("o")},
    DataConfig: {"sources": ("text",), "tokenizer": "ckpt", "out": Path("o")},
    ImportanceConfig: {"checkpoint": "ckpt", "data": Path("d"), "out": Path("o")},
    SearchConfig: {
        "checkpoint": "ckpt", "params": "50%", "importance": Path("i"), "data": Path("d"), "out": Path("o"),
    },
    PruneConfig: {"checkpoint": "ckpt", "out": Path("o")},
    CorrectConfig: {"teacher": "t", "data": Path("d"), "steps": 1, "out": Path("o")},
    DistillConfig: {"student": "s", "teacher": "t", "data": Path("d"), "steps": 1, "out": Path("o")},
    EvalConfig: {"checkpoint": "ckpt", "data": Path("d"), "out": Path("o")},
    RunConfig: {"recipe": "quickstart"},
    PlanConfig: {"recipe": "quickstart"},
    CompressConfig: {"checkpoint": "ckpt", "params": "50%", "data": ("text",), "out": Path("o")},
    ReportConfig: {"run": Path("r")},
    Recipe: {"name": "n", "teacher": "t", "data": {"sources": ["text"]}},
}  # fmt: skip
"""What has to be given, by the fields or by the rules between them."""


def build(cls: type[StageConfig], **changes: Any) -> Any:
    return cls(**{**NEEDED[cls], **changes})


def refusal(cls: type[StageConfig], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, **changes)
    return one_sentence(str(caught.value))


def one_sentence(message: str) -> str:
    assert "\n" not in message and message.endswith((".", "?")), message
    return message


def test_every_class_is_here() -> None:
    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(child) for child in cls.__subclasses__()))

    declared = {cls for cls in below(StageConfig) if cls.__module__.startswith("minitron_cli.config.")}
    shared = {TextConfig, OptimizerConfig, ShardingConfig, TrainingConfig}
    assert {cls for cls in declared if dataclasses.fields(cls)} - {StageConfig} <= {*NEEDED} | shared | {
        cls for cls in declared if cls.__module__.endswith(".base")
    }


@pytest.mark.parametrize("cls", NEEDED, ids=lambda cls: cls.__name__)
def test_defaults_are_valid(cls: type[StageConfig]) -> None:
    config = build(cls)
    assert type(config).from_mapping(NEEDED[cls]) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = Path("elsewhere")


@pytest.mark.parametrize("cls", NEEDED, ids=lambda cls: cls.__name__)
def test_json_is_plain_and_comes_back(cls: type[StageConfig]) -> None:
    import json

    config = build(cls)
    assert cls.from_mapping(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("cls", NEEDED, ids=lambda cls: cls.__name__)
def test_unknown_key_names_the_nearest(cls: type[StageConfig]) -> None:
    name = dataclasses.fields(cls)[-1].name
    with pytest.raises(ConfigError, match=rf"'part\.{name}x'; did you mean '{name}'\?"):
        cls.from_mapping({**NEEDED[cls], f"{name}x": 1}, where="part.")
    with pytest.raises(ConfigError, match=r"'qqqqq'; known keys: ") as caught:
        cls.from_mapping({**NEEDED[cls], "qqqqq": 1})
    one_sentence(str(caught.value))


def test_missing_key() -> None:
    with pytest.raises(ConfigError, match=r"distill\.student is required"):
        DistillConfig.from_mapping({"out": "o", "data": "d"}, where="distill.")


BAD = [
    (DataConfig, "seq_len", 1),
    (DataConfig, "validation", 0.6),
    (DataConfig, "max_tokens", 0),
    (DataConfig, "split_documents", "page"),
    (DataConfig, "seed", -1),
    (ImportanceConfig, "samples", 0),
    (ImportanceConfig, "batch_agg", "max"),
    (SearchConfig, "count", "all"),
    (SearchConfig, "candidates", 0),
    (PruneConfig, "hidden", 0),
    (PruneConfig, "kv_heads", "many"),
    (PruneConfig, "drop_layers", (-1,)),
    (DistillConfig, "steps", 0),
    (DistillConfig, "lr", 0.0),
    (DistillConfig, "min_lr", 1.5),
    (DistillConfig, "beta1", 1.0),
    (DistillConfig, "loss", "klx"),
    (EvalConfig, "limit", 0),
    (EvalConfig, "batch_size", 2.5),
    (CompressConfig, "tokens", 0),
    (Recipe, "baselines", ("random",)),
]


@pytest.mark.parametrize(("cls", "name", "value"), BAD, ids=lambda item: getattr(item, "__name__", str(item)))
def test_bounds(cls: type[StageConfig], name: str, value: Any) -> None:
    message = refusal(cls, **{name: value})
    assert message.startswith(f"--{name.replace('_', '-')}: ")
    assert repr(value[0] if isinstance(value, tuple) else value) in message


def test_bounds_in_a_recipe_name_the_section() -> None:
    with pytest.raises(ConfigError, match=r"^importance: --samples: .*got 0\)\.$"):
        ImportanceConfig.from_mapping({**NEEDED[ImportanceConfig], "samples": 0}, where="importance.")


RULES = [
    (DataConfig, {"sources": ()}, "at least one SOURCE"),
    (DataConfig, {"max_tokens": 100, "seq_len": 256}, "less than one sequence"),
    (PruneConfig, {"hidden": 64, "plan": Path("p")}, "only one of the three"),
    (PruneConfig, {"search": Path("s"), "plan": Path("p")}, "only one of the three"),
    (PruneConfig, {"layers": 2, "drop_layers": (1,)}, "not both"),
    (DistillConfig, {"tokens": 10}, "--steps or --tokens"),
    (DistillConfig, {"steps": None}, "--steps or --tokens"),
    (DistillConfig, {"teacher": None}, "--loss ce"),
    (DistillConfig, {"batch_size": 6, "micro_batch": 4}, "not a multiple"),
    (EvalConfig, {"data": None}, "--tasks"),
    (EvalConfig, {"data_dir": Path("m")}, "--tasks"),
    (SearchConfig, {"params_range": "1M:2M"}, "one of the two"),
    (SearchConfig, {"params": None}, "one of the two"),
    (SearchConfig, {"importance": None}, "--importance"),
    (SearchConfig, {"out": None}, "--out"),
    (Recipe, {"importance": {}, "search": {"params": "50%"}, "prune": {}}, "not both"),
    (Recipe, {"search": {"params": "50%"}}, "importance section"),
    (Recipe, {"baselines": ("scratch",)}, "distill section"),
    (Recipe, {"distill": {"steps": 1, "lrr": 1.0}}, "distill.lrr"),
    (Recipe, {"distill": {"steps": 1, "teacher": "x"}}, "distill.teacher"),
    (Recipe, {"importance": {"samples": 0}}, "importance: --samples"),
]


@pytest.mark.parametrize(("cls", "changes", "words"), RULES, ids=lambda item: getattr(item, "__name__", str(item)))
def test_rules_between_fields(cls: type[StageConfig], changes: dict[str, Any], words: str) -> None:
    assert words in refusal(cls, **changes)


def test_ce_needs_no_teacher() -> None:
    assert build(DistillConfig, teacher=None, loss="ce").teacher is None


def test_list_needs_only_a_budget() -> None:
    assert SearchConfig(checkpoint="ckpt", params="50%", list=True).out is None


@pytest.mark.parametrize("given", ["3,4", ("3", "4"), ("3,4",), ["3, 4", ""], (3, 4), "3,,4,"])
def test_commas_separate_where_the_option_says_so(given: Any) -> None:
    assert build(PruneConfig, drop_layers=given).drop_layers == (3, 4)


def test_commas_stay_elsewhere() -> None:
    assert build(SearchConfig, grid=("hidden=96,112",)).grid == ("hidden=96,112",)
    assert build(DataConfig, sources=("a,b.txt",)).sources == ("a,b.txt",)


def test_key_leaves_out_what_cannot_change_the_result() -> None:
    one = build(DistillConfig)
    same = build(DistillConfig, out=Path("other"), force=True, save_every=7)
    assert one.key() == same.key()
    assert one.key() != build(DistillConfig, seed=1).key()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).name == name


def test_recipe_changes(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ("distill.steps=3", "eval.tasks=[mmlu]", "baselines=[]"))
    assert recipe.distill is not None and recipe.distill["steps"] == 3
    assert recipe.eval is not None and recipe.eval["tasks"] == ["mmlu"] and recipe.baselines == ()
    for change, words in [
        ("distill.steps", "section.key=value"),
        ("distill.stepz=3", "did you mean 'steps'"),
        ("distill.steps=[", "not valid YAML"),
        ("name.x=3", "holds a value"),
        ("distil.steps=3", "did you mean 'distill'"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            load_recipe("quickstart", (change,))
        one_sentence(str(caught.value))


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [\n", "", "name: x\n", "name: x\nteacher: t\ndata: 3\n"])
def test_senseless_recipes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    one_sentence(str(caught.value))


def test_absent_recipe() -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a shipped recipe \(.*quickstart"):
        load_recipe("quickstartt")
