"""Scores that look at outgoing weights, against their formulas; scores that rank nothing are errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from helpers_chain import make_checkpoint, make_data
from helpers_tokenizer import make_tokenizer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.importance.stage import run_importance
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune.stage import plan_prune
from minitron_cli.tokens import TokenDataset, batch_rows

SAMPLES = 10


def score(checkpoint: Path, data: Path, out: Path, **options: object) -> dict[str, np.ndarray]:
    run_importance(
        ImportanceConfig(
            checkpoint=str(checkpoint), data=data, out=out, samples=SAMPLES, batch_size=4, loss_samples=0,
            collect=("weighted",), **options,
        )
    )  # fmt: skip
    return load_file(out / "scores.safetensors")


def entering(checkpoint: Path, data: Path, ends: dict[str, str]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs (samples, seq, channels) and weights (hidden, channels) of some projections, by layer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    split = TokenDataset(data).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, SAMPLES, len(split))))
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {kind: [] for kind in ends}
    for kind, path in ends.items():
        for layer in range(Checkpoint(checkpoint).shape["layers"]):
            module = model.get_submodule(path.format(layer=layer))
            module.register_forward_pre_hook(
                lambda module, args, kind=kind: found[kind].append(
                    (args[0].reshape(SAMPLES, -1, args[0].shape[-1]), module.weight.detach())
                )
            )
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_weighted_scores_match_the_formulas(stream: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    found = score(checkpoint, data, tmp_path / "out", stream=stream)
    seen = entering(
        checkpoint, data,
        {"ffn": "model.layers.{layer}.mlp.down_proj", "heads": "model.layers.{layer}.self_attn.o_proj"},
    )  # fmt: skip

    def expected(kind: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
        contributions, fluctuations = [], []
        for inputs, weight in seen[kind]:
            weighted = (inputs * weight.norm(dim=0)).double()
            units = weighted.unflatten(-1, (-1, channels))
            contributions.append(units.norm(dim=-1).mean(1).square().sum(0).sqrt().numpy())
            fluctuations.append(units.flatten(0, 1).var(0, correction=0).sum(-1).numpy())
        return np.stack(contributions), np.stack(fluctuations)

    for axis, kind, channels in (("ffn", "ffn", 1), ("group", "heads", 16), ("kv_heads", "heads", 32)):
        contribution, fluctuation = expected(kind, channels)
        np.testing.assert_allclose(found[f"{axis}.contribution"].reshape(contribution.shape), contribution, rtol=2e-4)
        np.testing.assert_allclose(found[f"{axis}.fluctuation"].reshape(fluctuation.shape), fluctuation, rtol=2e-4)
    assert "hidden.contribution" not in found


def test_flattened_activations_are_scored_by_sequence(tmp_path: Path) -> None:
    """OPT's MLP sees (batch * seq, channels)."""
    source = tmp_path / "model"
    make_tokenizer(source)
    make_model(source, "opt", vocab_size=len(load_tokenizer(source)))
    data = make_data(tmp_path / "data", source)
    found = score(source, data, tmp_path / "out")
    seen = entering(source, data, {"ffn": "model.decoder.layers.{layer}.fc2"})["ffn"]
    expected = np.stack([inputs.abs().mean(1).square().sum(0).sqrt().numpy() for inputs, _ in seen])
    np.testing.assert_allclose(found["ffn"], expected, rtol=2e-4)
    assert (found["ffn"].std(1) > 0).all() and (found["ffn.fluctuation"].std(1) > 0).all()


def test_the_chosen_score_decides(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    found = score(checkpoint, data, tmp_path / "out")
    plans = {}
    for kind in ("activation", "contribution", "fluctuation"):
        config = PruneConfig(
            checkpoint=str(checkpoint),
            importance=tmp_path / "out",
            ffn=28,
            heads=3,
            out=tmp_path / "x",
            width_score=kind,
        )
        plans[kind] = plan_prune(config)
        scores = found["ffn" if kind == "activation" else f"ffn.{kind}"]
        for kept, values in zip(plans[kind].keep["ffn"], scores, strict=True):
            assert values[kept].min() >= np.delete(values, kept).max()
    assert len({str(plan.keep) for plan in plans.values()}) == 3
    assert "fluctuation" in plans["fluctuation"].ranked_by and "fluctuation" not in plans["activation"].ranked_by


def test_missing_and_useless_scores_are_errors(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    data = make_data(tmp_path / "data", checkpoint)
    found = score(checkpoint, data, tmp_path / "out")
    base = PruneConfig(checkpoint=str(checkpoint), importance=tmp_path / "out", ffn=28, out=tmp_path / "x")
    for value, words in (
        (np.nan, "Scores of ffn are not finite"),
        (np.inf, "Scores of ffn are not finite"),
        (1.0, "All scores of ffn are the same"),
    ):
        changes = {"ffn.fluctuation": np.full_like(found["ffn"], value)}
        save_file({**found, **changes}, tmp_path / "out" / "scores.safetensors")
        with pytest.raises(InputError, match=words):
            plan_prune(base)
    save_file(
        {name: value for name, value in found.items() if "." not in name}, tmp_path / "out" / "scores.safetensors"
    )
    options = {"importance": tmp_path / "out", "ffn": 28, "out": tmp_path / "x", "width_score": "fluctuation"}
    with pytest.raises(InputError, match="--collect weighted"):
        plan_prune(PruneConfig(checkpoint=str(checkpoint), **options))
    with pytest.raises(ConfigError, match="--width-score needs --importance"):
        plan_prune(PruneConfig(checkpoint=str(checkpoint), **{**options, "importance": None}))
