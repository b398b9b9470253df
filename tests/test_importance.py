"""Width and depth scores against a slow reference written from the paper's formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_chain import make_checkpoint, make_data
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import InputError
from minitron_cli.importance.stage import run_importance
from minitron_cli.importance.statistics import SampleStatistic, reduce_sequence
from minitron_cli.prune.stage import plan_prune
from minitron_cli.tokens import TokenDataset, batch_rows

AGGREGATORS = ("mean", "l2", "var")


def aggregate(scores: np.ndarray, kind: str) -> np.ndarray:
    """Section 2 of the method, over the first axis, in fp64."""
    scores = scores.astype(np.float64)
    if kind == "mean":
        return np.abs(scores).mean(0)
    return np.sqrt((scores**2).sum(0)) if kind == "l2" else scores.var(0)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    checkpoint = make_checkpoint(tmp_path / "model")
    return checkpoint, make_data(tmp_path / "data", checkpoint)


def score(chain: tuple[Path, Path], out: Path, **options: object) -> dict[str, np.ndarray]:
    config = ImportanceConfig(checkpoint=str(chain[0]), data=chain[1], out=out, samples=10, **options)
    run_importance(config)
    return load_file(out / "scores.safetensors")


def activations(chain: tuple[Path, Path], samples: int) -> dict[str, list[torch.Tensor]]:
    """Inputs of down_proj and o_proj, outputs of the norms, by layer, each (samples, seq, channels)."""
    model = AutoModelForCausalLM.from_pretrained(chain[0], dtype=torch.float32).eval()
    split = TokenDataset(chain[1]).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, samples, len(split))))
    seen: dict[str, list[torch.Tensor]] = {}
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.setdefault("ffn", []).append(a[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.setdefault("attention", []).append(a[0]))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda m, a, out: seen.setdefault("hidden", []).append(out))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    seen["states"] = list(output.hidden_states)
    return seen


@pytest.mark.parametrize("batch_agg", AGGREGATORS)
@pytest.mark.parametrize("seq_agg", AGGREGATORS)
def test_width_scores_match_the_formulas(
    chain: tuple[Path, Path], tmp_path: Path, batch_agg: str, seq_agg: str
) -> None:
    found = score(chain, tmp_path / "out", batch_agg=batch_agg, seq_agg=seq_agg, batch_size=3, loss_samples=0)
    seen = activations(chain, 10)

    def expected(values: torch.Tensor) -> np.ndarray:
        per_sample = np.stack([aggregate(sample, seq_agg) for sample in values.numpy()])
        return aggregate(per_sample, batch_agg)

    ffn = np.stack([expected(values) for values in seen["ffn"]])
    np.testing.assert_allclose(found["ffn"], ffn, rtol=2e-4, atol=1e-9)
    hidden = sum(expected(values) for values in seen["hidden"])
    np.testing.assert_allclose(found["hidden"], hidden, rtol=2e-4, atol=1e-9)
    # Six query heads of 16 channels on three KV heads; a head's score is of the norm of its output.
    heads = np.stack([expected(v.unflatten(-1, (6, 16)).norm(dim=-1)) for v in seen["attention"]])
    np.testing.assert_allclose(found["group"], heads.reshape(4, 3, 2), rtol=2e-4, atol=1e-9)
    groups = np.stack([expected(v.unflatten(-1, (3, 32)).norm(dim=-1)) for v in seen["attention"]])
    np.testing.assert_allclose(found["kv_heads"], groups, rtol=2e-4, atol=1e-9)


def test_block_importance_matches_the_formula(chain: tuple[Path, Path], tmp_path: Path) -> None:
    found = score(chain, tmp_path / "out", batch_size=4, loss_samples=4)
    states = activations(chain, 10)["states"]
    for layer in range(3):  # the stock class applies the final norm to the last state, so the last layer is left out
        cosine = torch.nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1)
        assert found["layers.bi"][layer] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    assert found["layers.loss"].shape == (4,)


def test_layer_loss_is_the_loss_without_the_layer(chain: tuple[Path, Path], tmp_path: Path) -> None:
    """Against models with that layer really removed."""
    found = score(chain, tmp_path / "out", loss_samples=4)
    split = TokenDataset(chain[1]).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, 10, len(split))[:4]))

    def loss(skip: int | None) -> float:
        model = AutoModelForCausalLM.from_pretrained(chain[0], dtype=torch.float32).eval()
        if skip is not None:
            del model.model.layers[skip]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    for layer in range(4):
        assert found["layers.loss"][layer] == pytest.approx(loss(layer) - loss(None), abs=2e-4)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_statistic_does_not_depend_on_batches(kind: str) -> None:
    """Exact in fp64 whatever the split; and equal to the definition."""
    values = torch.randn(23, 5, dtype=torch.float64)
    whole, parts = SampleStatistic(5, kind), SampleStatistic(5, kind)
    whole.add(values)
    for start in range(0, 23, 4):
        parts.add(values[start : start + 4])
    assert torch.equal(whole.value(), parts.value())
    np.testing.assert_allclose(whole.value().numpy(), aggregate(values.numpy(), kind), rtol=1e-12)


def test_sequence_variance_needs_the_sign() -> None:
    """var is of the activation itself: a channel that alternates +1, -1 varies, one that stays 1 does not."""
    values = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]])
    assert reduce_sequence(values, "var").tolist() == [[1.0, 0.0]]


def test_scores_belong_to_one_checkpoint(chain: tuple[Path, Path], tmp_path: Path) -> None:
    score(chain, tmp_path / "out")
    other = make_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="another checkpoint"):
        plan_prune(PruneConfig(checkpoint=str(other), importance=tmp_path / "out", ffn=40, out=tmp_path / "x"))


def test_plan_keeps_the_highest_scores(chain: tuple[Path, Path], tmp_path: Path) -> None:
    found = score(chain, tmp_path / "out")
    config = PruneConfig(checkpoint=str(chain[0]), importance=tmp_path / "out", ffn=40, layers=3, out=tmp_path / "x")
    plan = plan_prune(config)
    dropped = int(np.argmin(found["layers.loss"]))
    assert plan.layers == [layer for layer in range(4) if layer != dropped]
    activations = plan_prune(replace(config, width_score="activation"))
    for each, scores in ((plan, found["ffn.fluctuation"]), (activations, found["ffn"])):  # by default what varies
        for kept, layer in zip(each.keep["ffn"], each.layers, strict=True):
            gone = np.setdiff1d(np.arange(56), kept)
            assert scores[layer][kept].min() >= scores[layer][gone].max()
