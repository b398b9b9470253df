"""Routed experts: scores against their formulas, in memory and streamed; what is told of them; the chain through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import STEADY, logits, make_model
from helpers_chain import make_data
from helpers_tokenizer import make_tokenizer
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from tiny import TINY
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.inspect import inspect_checkpoint
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.evaluate import EvalConfig
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.distill.stage import run_distill
from minitron_cli.errors import CheckpointError, ConfigError, InputError
from minitron_cli.evaluate.stage import run_eval
from minitron_cli.importance.stage import run_importance
from minitron_cli.models.taps import find_taps
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune.execute import check_plan
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.sizes import complete_target
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.shape import Shape
from minitron_cli.tokens import TokenDataset, batch_rows

SAMPLES = 10
IDS = torch.arange(3, 20)[None]
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "phimoe")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of some families a tiny model with a tokenizer, and data."""
    found = {}
    for family in FAMILIES:
        base = tmp_path_factory.mktemp(family)
        make_tokenizer(base / "model")
        make_model(base / "model", family, vocab_size=len(load_tokenizer(base / "model")))
        found[family] = base / "model", make_data(base / "data", base / "model")
    return found


def score(checkpoint: Path, data: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    common = dict(samples=SAMPLES, batch_size=4, loss_samples=0)
    run_importance(ImportanceConfig(checkpoint=str(checkpoint), data=data, out=out, **{**common, **options}))
    return load_file(out / "scores.safetensors")


def references(checkpoint: Path, data: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Router weights (samples, seq, experts; 0 where not chosen), norms of outputs likewise, neurons (..., ffn)."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()
    split = TokenDataset(data).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, SAMPLES, len(split))))
    shape, found = Checkpoint(checkpoint).shape, {}

    def listen(layer: int) -> Any:
        def hear(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, weights = args
            gates, norms, inner = [], [], []
            for expert in range(shape["experts"]):
                chosen = index == expert
                first, last = module.gate_up_proj[expert], module.down_proj[expert]
                if getattr(module, "is_transposed", False):
                    both = hidden @ first + module.gate_up_proj_bias[expert]
                    neurons = module._apply_gate(both)
                    output = neurons @ last + module.down_proj_bias[expert]
                else:
                    gate, up = (hidden @ first.t()).chunk(2, dim=-1)
                    neurons = module.act_fn(gate) * up
                    output = neurons @ last.t()
                asked = chosen.any(-1)
                gates.append((weights * chosen).sum(-1))
                norms.append(output.norm(dim=-1) * asked)
                inner.append(neurons * asked[:, None])
            shaped = (SAMPLES, -1, shape["experts"])
            found[layer] = (
                torch.stack(gates, -1).view(shaped),
                torch.stack(norms, -1).view(shaped),
                torch.stack(inner, 1).view(*shaped, shape["expert_ffn"]),
            )

        return hear

    for tap, layer in find_taps(shape, "experts"):
        assert layer is not None
        model.get_submodule(tap.module.format(layer=layer)).register_forward_pre_hook(listen(layer))
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_match_the_formulas_streamed_too(
    family: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, data = checkpoints[family]
    found = score(checkpoint, data, tmp_path / "out")
    streamed = score(checkpoint, data, tmp_path / "streamed", stream=True)
    assert found.keys() == streamed.keys()
    assert all(np.array_equal(found[name], streamed[name]) for name in found)
    shape = Checkpoint(checkpoint).shape
    seen = references(checkpoint, data)
    assert seen
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    outgoing = {}
    for tap, layer in find_taps(shape, "experts"):
        last = model.get_submodule(tap.module.format(layer=layer)).down_proj.detach()
        outgoing[layer] = (last if family == "gpt_oss" else last.mT).norm(dim=-1)
    for layer, (gates, norms, neurons) in seen.items():
        counts = (norms > 0).flatten(0, 1).sum(0)
        reap = (gates * norms).flatten(0, 1).double().sum(0) / counts.clamp_min(1)
        expected = {
            "experts": reap,
            "experts.tokens": counts,
            "experts.frequency": counts / (gates.shape[0] * gates.shape[1]),
            "experts.activation": norms.mean(1).square().sum(0).sqrt(),
            "expert_ffn": neurons.abs().mean(1).square().sum(0).sqrt(),
        }
        leaving = outgoing[layer]
        expected["expert_ffn.contribution"] = expected["expert_ffn"] * leaving
        own = [neurons[..., expert, :][norms[..., expert] > 0].double() for expert in range(shape["experts"])]
        expected["expert_ffn.fluctuation"] = leaving**2 * torch.stack(
            [each.var(0, correction=0) if len(each) else torch.zeros(each.shape[-1]) for each in own]
        )
        for name, values in expected.items():
            np.testing.assert_allclose(found[name][layer], values.numpy(), rtol=2e-4, atol=1e-7, err_msg=name)
    for layer in set(range(shape["layers"])) - seen.keys():
        assert not found["experts"][layer].any()


@pytest.mark.parametrize("aggregator", ["mean", "var"])
def test_other_aggregators(aggregator: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, data = checkpoints["granitemoe"]
    found = score(checkpoint, data, tmp_path / "out", seq_agg="var" if aggregator == "var" else "l2", batch_agg="mean")
    for layer, (_, norms, neurons) in references(checkpoint, data).items():
        for name, values in (("experts.activation", norms), ("expert_ffn", neurons)):
            over = values.var(1, correction=0) if aggregator == "var" else values.square().sum(1).sqrt()
            np.testing.assert_allclose(found[name][layer], over.mean(0).numpy(), rtol=1e-3, atol=1e-6)


def test_the_chosen_score_decides(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, data = checkpoints["qwen3_moe"]
    found = score(checkpoint, data, tmp_path / "out")
    for kind, name in (("reap", "experts"), ("activation", "experts.activation"), ("frequency", "experts.frequency")):
        config = PruneConfig(
            checkpoint=str(checkpoint), importance=tmp_path / "out", experts=3, out=tmp_path / "x", expert_score=kind
        )
        plan = plan_prune(config)
        for layer, kept in zip(plan.layers, plan.keep["experts"], strict=True):
            values = found[name][layer]
            assert not kept or values[kept].min() >= np.delete(values, kept).max()
    with pytest.raises(ConfigError, match="--expert-score needs --importance"):
        plan_prune(PruneConfig(checkpoint=str(checkpoint), experts=3, out=tmp_path / "x", expert_score="frequency"))


def test_experts_that_saw_no_token_are_named(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = checkpoints["qwen3_moe"]
    tensors = load_tensors(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][4] = 0
    tensors["model.layers.1.mlp.gate.weight"][4, STEADY] = -1e4
    out = tmp_path / "model"
    make_tokenizer(out)
    save_tensors(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    result = run_importance(
        ImportanceConfig(checkpoint=str(out), data=data, out=tmp_path / "scores", samples=4, loss_samples=0)
    )
    assert result.expert_tokens.keys() == {"1", "3"}
    assert result.expert_tokens["1"][4] == 0
    assert all(sum(counts) == 2 * result.tokens for counts in result.expert_tokens.values())
    told = capsys.readouterr().err
    unseen = [str(expert) for expert, count in enumerate(result.expert_tokens["1"]) if not count]
    assert f"No token reached experts {', '.join(unseen)} of layer 1" in told and "on average" in told
    plan = plan_prune(PruneConfig(checkpoint=str(out), importance=tmp_path / "scores", experts=4, out=tmp_path / "x"))
    assert 4 not in plan.keep["experts"][1]


def test_groups_keep_equally_many(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """DeepSeek's router looks at groups of consecutive experts first."""
    checkpoint, _ = checkpoints["deepseek_v3"]
    plan = plan_prune(PruneConfig(checkpoint=str(checkpoint), experts=6, out=tmp_path / "x"))
    kept = plan.keep["experts"]
    assert kept[0] == [] and all(sum(unit < 5 for unit in units) == 3 == len(units) / 2 for units in kept[1:])
    uneven = json.loads(json.dumps(plan.to_json()))
    uneven["keep"]["experts"][1] = [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="equally many units of experts in each of its 2 groups"):
        check_plan(PrunePlan.from_json(uneven), Checkpoint(checkpoint).shape)


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [
        ("deepseek_v3", {"experts": 5}, "DeepseekV3TopkRouter: view"),
        ("deepseek_v3", {"experts": 2}, "too few: the stock class needs 4 .*topk"),
        ("deepseek_v3", {"qk_nope": 4}, "scaling = "),
        ("deepseek_v3", {"shared_ffn": 8}, "computes it as expert_ffn \\* shared_experts"),
        ("phimoe", {"experts": 1}, "too few: the stock class needs 2 .sparsemixer"),
        ("mixtral", {"expert_ffn": 20}, "not a multiple of 8, .*grouped_mm"),
        ("olmoe-clipped", {"hidden": 72}, "head_dim would change from 16 to 12.*clamp_"),
        ("mixtral", {"shared_ffn": 8}, "no axis 'shared_ffn'"),
    ],
)
def test_what_the_stock_class_forbids_is_quoted(family: str, target: dict[str, int], words: str) -> None:
    with pytest.raises(Exception, match=words):
        complete_target(Shape.of(TINY[family]), target)


@pytest.mark.parametrize(
    ("family", "experts", "chosen"), [("mixtral", 1, 1), ("deepseek_v3", 4, 2), ("deepseek_v3", 6, 3), ("phimoe", 2, 2)]
)
def test_no_token_passes_more_experts_than_are_left(family: str, experts: int, chosen: int, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", family)
    run_prune(PruneConfig(checkpoint=str(source), experts=experts, out=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts_per_tok"] == chosen == Checkpoint(tmp_path / "out").shape.experts_per_token


def test_the_chain(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Scores, a cut, a few steps and an evaluation; the routing bias is neither rounded nor trained."""
    source, data = checkpoints["deepseek_v3"]
    score(source, data, tmp_path / "scores")
    run_prune(
        PruneConfig(
            checkpoint=str(source), importance=tmp_path / "scores", data=data, repair_samples=8, experts=6,
            expert_ffn=16, kv_rank=20, out=tmp_path / "cut",
        )
    )  # fmt: skip
    result = run_distill(
        DistillConfig(
            student=str(tmp_path / "cut"), teacher=str(source), data=data, steps=3, batch_size=4, lr=1e-3,
            out=tmp_path / "student",
        )
    )  # fmt: skip
    assert result.steps == 3
    cut, student = (load_tensors(tmp_path / name / "model.safetensors") for name in ("cut", "student"))
    assert cut.keys() == student.keys()
    changed = {name for name in cut if not torch.equal(cut[name], student[name])}
    assert any(".experts." in name for name in changed) and any("gate.weight" in name for name in changed)
    assert not any("e_score_correction_bias" in name for name in changed)
    assert run_eval(EvalConfig(checkpoint=str(tmp_path / "student"), data=data, out=tmp_path / "eval")).perplexity > 0


def packed(path: Path, family: str) -> tuple[str, int]:
    """A checkpoint as it was published: experts in MXFP4 blocks, or FP8 matrices with scales; its parameters."""
    source = make_model(path, family)
    params = inspect_checkpoint(str(source))["params"]
    tensors = load_tensors(path / "model.safetensors")
    if family == "gpt_oss":
        method = "mxfp4"
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, rows, columns = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = torch.zeros(experts, columns, max(rows // 32, 1), 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(experts, columns, max(rows // 32, 1), dtype=torch.uint8)
    else:
        method = "fp8"
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_tensors(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    return method, params


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_packed_experts_are_counted_and_not_cut(family: str, tmp_path: Path) -> None:
    method, params = packed(tmp_path / "model", family)
    found = inspect_checkpoint(str(tmp_path / "model"))
    assert found["params"] == params and f"quantised ({method})" in found["notes"][0]
    with pytest.raises(CheckpointError, match=rf"\({method}\).*take the bf16 checkpoint of the same model"):
        run_prune(PruneConfig(checkpoint=str(tmp_path / "model"), experts=4, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_multi_token_prediction_layers_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek stores them as layers past the last one."""
    source = make_model(tmp_path / "source", "deepseek_v3", num_nextn_predict_layers=1)
    plain = logits(source, IDS)
    tensors = load_tensors(source / "model.safetensors")
    further = {name.replace(".3.", ".4.", 1): value.clone() for name, value in tensors.items() if "layers.3." in name}
    save_tensors({**tensors, **further}, source / "model.safetensors", metadata={"format": "pt"})
    run_prune(PruneConfig(checkpoint=str(source), experts=10, layers=4, out=tmp_path / "out"))
    assert "multi-token-prediction layers: the stock class does not load them" in capsys.readouterr().err
    assert load_tensors(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert torch.equal(logits(tmp_path / "out", IDS), plain)
