"""Read scores back, for the checkpoint they were made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from minitron_cli.errors import InputError
from minitron_cli.importance.layout import SCORES, Scores, score_shape, scored_axes
from minitron_cli.manifest import read_manifest
from minitron_cli.shape import Shape

LAYER_SCORES = ("loss", "bi")


def load_scores(directory: Path, shape: Shape, source: str, layer_score: str) -> Scores:
    """Scores written by the importance stage for this very checkpoint.

    Args:
        source: fingerprint of the checkpoint to be cut.
        layer_score: "loss", "bi", or "auto" (loss where it was measured).

    Raises:
        InputError: not an importance directory, made for another checkpoint, or without the layer score asked for.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("stage") != "importance" or not (directory / SCORES).is_file():
        raise InputError(f"{directory} is not the result of `minitron importance`; run it first.")
    if manifest["inputs"].get("checkpoint") != source:
        raise InputError(f"{directory} scores another checkpoint than the one to be cut; score this one.")
    stored = {name: array.astype(np.float64) for name, array in load_file(directory / SCORES).items()}
    scores = {name: array for name, array in stored.items() if not name.startswith("layers.")}
    for axis in scored_axes(shape):
        if axis.name in scores and scores[axis.name].shape != score_shape(shape, axis):
            raise InputError(
                f"{directory}: scores of {axis.name} have another shape than the checkpoint; score it again."
            )
    for kind in LAYER_SCORES if layer_score == "auto" else (layer_score,):
        if f"layers.{kind}" in stored:
            return {**scores, "layers": stored[f"layers.{kind}"]}
    raise InputError(
        f"{directory} has no {layer_score} layer scores; run `minitron importance` with --loss-samples above 0."
    )
