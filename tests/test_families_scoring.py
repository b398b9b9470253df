"""Scoring on every proven family: taps give finite statistics of the declared shapes, and layers can be skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from oracle import cases
from tiny import TINY
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.importance.depth import DepthScores
from minitron_cli.importance.layout import score_shape
from minitron_cli.importance.nested import NestedScores
from minitron_cli.importance.weights import weight_norm_scores
from minitron_cli.importance.width import KINDS, WidthScores
from minitron_cli.models.head import Head, backbone_output
from minitron_cli.models.taps import PlacedTap, listening, place_taps, skipped_layer
from minitron_cli.prune.plan import make_plan

IDS = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", TINY)
def test_scores_of_a_family(family: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", family)
    checkpoint = Checkpoint(path)
    shape = checkpoint.shape
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    taps, blocks = list(place_taps(model, shape, KINDS)), list(place_taps(model, shape, ("block",)))
    width, depth = WidthScores(shape, taps, "l2", "mean"), DepthScores(shape["layers"])
    handles = depth.attach(blocks)
    # As the sweeps do it: OPT's MLP sees (batch * seq, channels).
    inside = list(place_taps(model, shape, ("nested",)))
    nested = NestedScores(shape, inside, "l2", "mean")

    def hear(at: PlacedTap, heard: torch.Tensor) -> None:
        # As the sweeps do it: OPT's MLP sees (batch * seq, channels).
        (nested if at in inside else width).heard(at, heard.reshape(2, 12, -1))

    with listening(taps + inside, hear), torch.inference_mode():
        whole = model(IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        output = backbone_output(model, IDS)
        torch.testing.assert_close(Head(model, output)(output.last_hidden_state[0]), whole[0])
    scores = {**weight_norm_scores(checkpoint), **width.scores(), **nested.scores(), "layers": depth.scores().numpy()}
    present = [axis for axis in shape.family.cut_axes if axis.name not in shape.absent]
    heard = {"hidden", "ffn", "group", "v_head_dim", *shape.family.nested} & {axis.name for axis in present}
    assert heard <= width.scores().keys() | nested.scores().keys()
    for axis in present:
        assert scores[axis.name].shape == score_shape(shape, axis), axis.name
        assert np.isfinite(scores[axis.name]).all() and scores[axis.name].std() > 0, axis.name
    assert scores["layers"].shape == (shape["layers"],) and (scores["layers"] > 0).all()
    with skipped_layer(blocks[1]), torch.inference_mode():
        assert not torch.allclose(model(IDS, use_cache=False).logits, whole, atol=1e-3)
    for target in cases(shape).values():
        assert make_plan(shape, scores, target, ranked_by="activations").params_after < shape.params
