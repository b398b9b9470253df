"""`minitron plan`: against published numbers, and against what the stages themselves say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.plan import PlanConfig
from minitron_cli.distill.memory import Case
from minitron_cli.errors import ConfigError
from minitron_cli.forecast.devices import DEVICES, known_as
from minitron_cli.forecast.stage import run_plan
from minitron_cli.forecast.table import format_plan

NEMOTRON_15B = {
    "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_size": 6144, "num_hidden_layers": 32,
    "intermediate_size": 24576, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 256000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "relu2",
    "partial_rotary_factor": 0.5, "torch_dtype": "bfloat16",
}  # fmt: skip
RECIPE = """
name: nemotron
teacher: {teacher}
data: {{sources: [text], seq_len: 4096}}
importance: {{samples: 1024, loss_samples: 0}}
prune: {{hidden: 4096, ffn: 16384}}
distill: {{tokens: 94000000000, batch_size: 1152}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    teacher = tmp_path / "nemotron"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(NEMOTRON_15B))
    (tmp_path / "nemotron.yaml").write_text(RECIPE.format(teacher=teacher))
    return str(tmp_path / "nemotron.yaml")


def distillation(recipe: str, *changes: str, **options: Any) -> dict[str, Any]:
    plan = run_plan(PlanConfig(recipe=recipe, set=changes, **{"devices": 128, "device": "a100", **options}))
    return plan.stages[-1]


def test_nemotron_15b_to_8b_on_128_a100(recipe: str) -> None:
    """Minitron (arXiv 2407.14679): 15.6B to 8.3B on 16 DGX A100, batch 1152, sequences of 4096, 94B tokens; 4.4e17 and
    2.5e17 operations for a training step of the 15B and the 8B, as 6 per parameter and token (section A.7).
    """
    part = distillation(recipe)
    assert part["params"] == pytest.approx(8.3e9, rel=0.01) and part["teacher_params"] == pytest.approx(
        15.6e9, rel=0.01
    )
    assert part["steps"] == pytest.approx(19_900, rel=0.01)
    alone = distillation(recipe, "distill.loss=ce")
    # An embedding table multiplies nothing, which 6 per parameter counts and this does not; attention is the opposite.
    assert alone["flops_per_step"] == pytest.approx(2.5e17, rel=0.15)
    whole = distillation(recipe, "distill.loss=ce", "prune.hidden=6144", "prune.ffn=24576")
    assert whole["flops_per_step"] == pytest.approx(4.4e17, rel=0.1)
    assert part["flops_per_step"] == pytest.approx(alone["flops_per_step"] + whole["flops_per_step"] / 3, rel=1e-6)
    # What one device holds: its part of 16 bytes per parameter, of the teacher, and what passes.
    assert (part["student_parts"], part["teacher_parts"], part["micro_batch"]) == (128, 128, 1)
    held = part["memory"]
    training = held["weights"] + held["gradients"] + held["optimizer"]
    assert training == pytest.approx(16 * part["params"] / 128, rel=1e-3)
    assert held["teacher"] == pytest.approx(2 * part["teacher_params"] / 128, rel=1e-3)
    assert 16 * part["params"] + 2 * part["teacher_params"] > 80e9  # whole models would not fit
    assert sum(held.values()) < 0.9 * 80e9
    # 7.3e21 operations at 40 % of 128 x 312 TFLOP/s.
    assert part["hours"] == pytest.approx(part["flops"] / (128 * 0.4 * 312e12) / 3600)
    assert 4 < part["hours"] / 24 < 7


def test_fewer_devices_hold_more_and_take_longer(recipe: str) -> None:
    many, few = distillation(recipe), distillation(recipe, devices=64)
    assert few["hours"] == pytest.approx(2 * many["hours"])
    assert few["memory"]["weights"] == pytest.approx(2 * many["memory"]["weights"], rel=1e-3)
    one = distillation(recipe, devices=1)
    assert one["micro_batch"] is None and one["student_parts"] == 1
    told = format_plan(run_plan(PlanConfig(recipe=recipe, device="a100")).to_json())
    assert "That does not fit: use checkpoint_activations, more devices" in told


def test_options_of_the_recipe_count(recipe: str) -> None:
    plain, again = distillation(recipe), distillation(recipe, "distill.checkpoint_activations=true")
    assert again["memory"]["activations"] / again["micro_batch"] < 0.3 * plain["memory"]["activations"]
    assert again["flops"] > plain["flops"]
    kept = distillation(recipe, "distill.keep_gathered=true")
    assert kept["memory"]["gathered"] > plain["memory"]["gathered"]
    away = distillation(recipe, "distill.offload=true")
    assert away["memory"]["optimizer"] == 0
    with pytest.raises(ConfigError, match="use 1100 or 1200"):
        distillation(recipe, devices=100)


def test_the_quickstart_is_what_its_stages_say() -> None:
    """One definition of memory: `distill --dry-run` and `plan` agree; every stage of the chain that trains is there."""
    plan = run_plan(PlanConfig(recipe="quickstart", memory="8GB"))
    assert [part["name"] for part in plan.stages] == ["importance", "search", "distill", "cross-entropy", "scratch"]
    part = plan.stages[2]
    teacher = Checkpoint(resolve("builtin:tiny-py")).shape
    assert part["teacher_params"] == teacher.params and part["micro_batch"] == 8
    assert 0.45 <= part["params"] / teacher.params <= 0.65
    config = DistillConfig(student="s", teacher="t", data=Path("d"), out=Path("o"), steps=1, batch_size=8, device="cpu")
    import torch

    case = Case(teacher, teacher, config, 256, torch.device("cpu"), torch.float32)
    assert case.memory(8)["teacher"] == part["memory"]["teacher"]
    assert case.memory(8)["loss chunk"] == part["memory"]["loss chunk"]
    assert plan.hours == pytest.approx(sum(each["hours"] for each in plan.stages)) and plan.speed > 1e8


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device v100 is not known; use b200"):
        run_plan(PlanConfig(recipe="quickstart", device="v100"))
    with pytest.raises(ConfigError, match="--memory lots: write a size such as 80GB"):
        run_plan(PlanConfig(recipe="quickstart", device="a100", memory="lots"))
    plan = run_plan(PlanConfig(recipe="quickstart", device="A100", memory="40GiB", peak=1e15, mfu=0.5))
    assert plan.device_memory == 40 << 30 and plan.speed == 5e14


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090")],
)
def test_devices_by_their_drivers_names(name: str, known: str) -> None:
    assert known_as(name) == DEVICES[known]
    assert known_as("Tesla K80") is None
