"""Read scores back, for the checkpoint they were made for and the cuts that are planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from minitron_cli.config.importance import ExpertScore, WidthScore
from minitron_cli.errors import InputError
from minitron_cli.importance.layout import (
    BASIS,
    CELLS,
    DIRECTIONS,
    ENERGY,
    SCORES,
    STATISTICS,
    TOKENS,
    Array,
    Scores,
    score_shape,
    scored_axes,
)
from minitron_cli.manifest import read_manifest
from minitron_cli.shape import Shape

WORDS = {
    "loss": "loss increase",
    "kl": "KL of the logits",
    "mse": "distance before the head",
    "task": "task score",
    "bi": "block importance",
}
EXPERT_WORDS = {"reap": "REAP", "activation": "activation", "frequency": "routing frequency"}
NEURONS = ("ffn", "shared_ffn", "expert_ffn")
OPTIONS = {
    "task": "--depth-task",
    "block": "--depth block and --remove",
    "greedy": "--depth greedy and --remove",
}
"""What importance is run with to have a layer score; others take --loss-samples."""


def load_scores(
    directory: Path,
    shape: Shape,
    source: str,
    layer_score: str,
    removed: Collection[int],
    width_score: WidthScore = "auto",
    expert_score: ExpertScore = "reap",
) -> tuple[Scores, str]:
    """Scores written by the importance stage for this very checkpoint, and what they rank by, in words.

    `layers` among the scores are (layers,), those that should leave first lowest. Beside them are what is known of the
    residual stream: energies by norm, and those of its directions.

    Args:
        source: fingerprint of the checkpoint to be cut.
        layer_score: a measure; "block" or "greedy" for what was found with several layers removed; "auto" for these
            where they fit `removed`, else the measure that importance was told decides, else block importance.
        removed: how many layers the planned cuts take out, one number per cut.
        width_score: what ranks the axes that such scores were gathered of; activations rank the others. "auto" ranks
            neurons by fluctuation, which measured best, where it was gathered.
        expert_score: what ranks routed experts.

    Raises:
        InputError: not an importance directory, made for another checkpoint, or without layer scores for such cuts.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("stage") != "importance" or not (directory / SCORES).is_file():
        raise InputError(f"{directory} is not the result of `minitron importance`; run it first.")
    if manifest["inputs"].get("checkpoint") != source:
        raise InputError(f"{directory} scores another checkpoint than the one to be cut; score this one.")
    stored = {name: array.astype(np.float64) for name, array in load_file(directory / SCORES).items()}
    scores = {name: array for name, array in stored.items() if "." not in name or name == CELLS}
    others = _other_scores(directory, stored, width_score)
    scores |= {axis: stored[f"{axis}.{kind}"] for axis, kind in others.items()}
    if f"experts.{expert_score}" in stored:
        scores["experts"] = stored[f"experts.{expert_score}"]
    for axis in scored_axes(shape):
        if axis.name in scores and scores[axis.name].shape != score_shape(shape, axis):
            raise InputError(
                f"{directory}: scores of {axis.name} have another shape than the checkpoint; score it again."
            )
    counts = {count for count in removed if count > 0}
    metric = manifest["config"].get("depth_metric", "loss")
    kind = _kind(directory, stored, shape["layers"], layer_score, metric, counts)
    ranked_by = f"importance {directory}" + "".join(f", {axis} by {kind}" for axis, kind in others.items())
    if TOKENS in stored:
        ranked_by += f", experts by {EXPERT_WORDS[expert_score]}"
    if counts:
        ranked_by += f", layers by {WORDS.get(kind) or f'{kind} removal, {WORDS[metric]}'}"
    return {**scores, **_stream(directory, shape), "layers": _ranks(stored, shape["layers"], kind, metric)}, ranked_by


def _other_scores(directory: Path, stored: Mapping[str, Array], asked: WidthScore) -> dict[str, str]:
    """The axes that something else than activations ranks, and what.

    Raises:
        InputError: what was asked for was not gathered.
    """
    if asked == "auto":
        return {axis: "fluctuation" for axis in NEURONS if f"{axis}.fluctuation" in stored}
    found: dict[str, str] = {name.partition(".")[0]: asked for name in stored if name.endswith(f".{asked}")}
    if asked != "activation" and not found:
        raise InputError(f"{directory} has no {asked} scores; run `minitron importance` with --collect weighted.")
    return found


def _stream(directory: Path, shape: Shape) -> dict[str, Array]:
    """Energies of the residual stream; none where it was scored before they were gathered."""
    if not (directory / STATISTICS).is_file():
        return {}
    with safe_open(directory / STATISTICS, framework="np") as file:
        names = [name for name in file.keys() if name.startswith(ENERGY) or name == DIRECTIONS]  # noqa: SIM118
        found = {name: file.get_tensor(name).astype(np.float64) for name in names}
    if any(array.shape != (shape["hidden"],) for array in found.values()):
        raise InputError(f"{directory}: {STATISTICS} is of another hidden size than the checkpoint; score it again.")
    return found


def load_basis(directory: Path, hidden: int, kept: int) -> torch.Tensor:
    """The directions of most energy as columns, (hidden, kept) fp32.

    Raises:
        InputError: they were not collected, or for another hidden size.
    """
    try:
        with safe_open(directory / STATISTICS, framework="pt") as file:
            basis = file.get_slice(BASIS)
            if basis.get_shape() == [hidden, hidden]:
                columns: torch.Tensor = basis[:, :kept]
                return columns.contiguous()
    except (OSError, SafetensorError):
        pass
    raise InputError(
        f"{directory} holds no directions of a stream of {hidden} channels; run `minitron importance` with "
        "--collect directions, and name its result with --importance."
    )


def _kind(directory: Path, stored: Mapping[str, Array], layers: int, asked: str, metric: str, counts: set[int]) -> str:
    """The layer score to use.

    Raises:
        InputError: it is not there, or says nothing about cuts like these.
    """
    names = {"block": f"blocks.{metric}", "greedy": "greedy.order"}
    for kind in ("block", "greedy", metric, "bi") if asked == "auto" else (asked,):
        values = stored.get(names.get(kind, f"layers.{kind}"))
        if values is None:
            continue
        length = layers - len(values) + 1 if kind == "block" else len(values)
        misfits = {
            count for count in counts if (kind == "block" and count != length) or (kind == "greedy" and count > length)
        }
        if not misfits:
            return kind
        if asked != "auto":
            scored = f"runs of {length} layers" if kind == "block" else f"a greedy order of length {length}"
            raise InputError(
                f"{directory} holds {scored}, but the cut removes {min(misfits)}; run `minitron importance` with "
                f"--depth {kind} --remove {max(misfits)}, or choose another --layer-score."
            )
    how = OPTIONS.get(asked, "--depth single and --loss-samples above 0")
    raise InputError(f"{directory} has no {asked} layer scores; run `minitron importance` with {how}.")


def _ranks(stored: Mapping[str, Array], layers: int, kind: str, metric: str) -> Array:
    """Scores (layers,) of which the lowest leave first."""
    if kind == "block":
        first, length = int(_order(stored, f"blocks.{metric}")[0]), layers - len(stored[f"blocks.{metric}"]) + 1
        ranks = np.ones(layers)
        ranks[first : first + length] = 0
        return ranks
    if kind != "task" and kind != "greedy":
        return stored[f"layers.{kind}"]
    order = stored["greedy.order"].astype(int) if kind == "greedy" else _order(stored, "layers.task")
    ranks = np.full(layers, float(len(order)))
    ranks[order] = np.arange(len(order))
    return ranks


def _order(stored: Mapping[str, Array], name: str) -> npt.NDArray[np.intp]:
    """Places by rising score; where few questions leave a task's scores tied, the loss decides."""
    values = stored[name]
    return np.lexsort((stored.get(name.partition(".")[0] + ".loss", values), values))
