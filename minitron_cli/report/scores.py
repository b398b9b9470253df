"""The section of importance scores: layers, neurons, hidden channels, heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitron_cli.drawing.format import count, number
from minitron_cli.drawing.svg import both
from minitron_cli.report import pictures
from minitron_cli.report.gather import Array, RunFiles, removed_layers, table

BLOCK_IMPORTANCE = (
    "Block importance",
    "1 − cosine similarity of a layer's input and output; where it is low the layer changes little",
)
MEASURES = (
    ("loss", "Loss increase", "nats per token on calibration text"),
    ("kl", "KL of the logits", "KL(whole || removed) of the next-token distributions, nats per token"),
    (
        "mse",
        "Distance before the head",
        "squared distance of the states before the head, as a share of their mean square",
    ),
    ("task", "Drop of the task", "the whole model's metric less the removed one's"),
)


def importance(files: RunFiles) -> dict[str, Any] | None:
    """Layer scores as bars, neuron and channel scores as strips, heads as a grid."""
    gone = removed_layers(files)
    figures = []
    if (values := files.scores.get("layers.bi")) is not None and values.ndim == 1:
        figures.append(_bars(*BLOCK_IMPORTANCE, values, gone))
    for measure, title, caption in MEASURES:
        figures += _removals(files, measure, title, caption, gone)
    widths = (_neurons(files, gone), _experts(files, gone), _hidden(files), _heads(files, gone))
    figures += [figure for figure in widths if figure is not None]
    if not figures:
        return None
    result = files.result("importance")
    return {
        "figures": figures,
        "legend": pictures.legend(),
        "samples": count(result.get("samples")),
        "tokens": count(result.get("tokens")),
    }


def _removals(files: RunFiles, measure: str, title: str, caption: str, gone: list[int]) -> list[dict[str, Any]]:
    """One measure without each layer, without each run of layers, and after each layer that left in turn."""
    layers, blocks, greedy = (files.scores.get(f"{kind}.{measure}") for kind in ("layers", "blocks", "greedy"))
    order = files.scores.get("greedy.order")
    figures = []
    if layers is not None and layers.ndim == 1:
        figures.append(_bars(f"{title} without the layer", f"{caption}, when this one layer is skipped", layers, gone))
    if blocks is not None and blocks.ndim == 1:
        said = f"{caption}, by the first layer of the contiguous run that is skipped"
        figures.append(_bars(f"{title} without a run of layers", said, blocks, [], unit="first layer of the run"))
    if greedy is not None and order is not None and greedy.ndim == order.ndim == 1 and len(greedy) == len(order):
        said = f"{caption}, when this layer and all to its left are skipped"
        left = [int(layer) for layer in order]
        figures.append(_bars(f"{title} as layers leave in turn", said, greedy, gone, left, "layer, in turn"))
    return figures


def _bars(
    title: str, caption: str, values: Array, gone: list[int], layers: Sequence[int] = (), unit: str = "layer"
) -> dict[str, Any]:
    chart = both(lambda width: pictures.layer_bars(title, values, gone, width, layers=layers, unit=unit))
    return {"title": title, "chart": chart, "caption": caption, "legend": False}


def _kept(files: RunFiles, axis: str) -> float | None:
    """The share of an axis that stays, where it is cut."""
    before, after = (number(table((files.plan or {}).get(key)).get(axis)) for key in ("sizes_before", "sizes"))
    return after / before if before and after is not None and after < before else None


def _neurons(files: RunFiles, gone: list[int]) -> dict[str, Any] | None:
    name = next((name for name in ("expert_ffn", "ffn") if name in files.scores and files.scores[name].ndim >= 2), None)
    if name is None:
        return None
    scores = files.scores[name]
    # Layers of another kind have no such neurons.
    own = [(layer, values.reshape(-1)) for layer, values in enumerate(scores) if values.any()]
    rows = [pictures.Strip(str(layer), values, layer in gone) for layer, values in own]
    title = "Neurons of experts, layer by layer" if name == "expert_ffn" else "FFN neurons, layer by layer"
    drawn = both(lambda width: pictures.strips(title, rows, _kept(files, name), width))
    caption = "each layer's neurons from strongest to weakest, as a share of the layer's 99th percentile"
    return {"title": title, "chart": drawn, "caption": caption, "legend": True}


def _experts(files: RunFiles, gone: list[int]) -> dict[str, Any] | None:
    scores = files.scores.get("experts")
    if scores is None or scores.ndim != 2:
        return None
    title = "Routed experts"
    drawn = both(lambda width: pictures.head_grid(title, scores, gone, 1, width, unit="expert"))
    caption = "layers down, experts across, by REAP as a share of the layer's strongest expert; pale rows have none"
    return {"title": title, "chart": drawn, "caption": caption, "legend": True}


def _hidden(files: RunFiles) -> dict[str, Any] | None:
    scores = files.scores.get("hidden")
    if scores is None or scores.ndim != 1:
        return None
    title = "Hidden channels, one choice for the whole model"
    drawn = both(lambda width: pictures.strips(title, [pictures.Strip("all", scores)], _kept(files, "hidden"), width))
    return {
        "title": title,
        "chart": drawn,
        "caption": "summed over all layers, from strongest to weakest",
        "legend": True,
    }


def _heads(files: RunFiles, gone: list[int]) -> dict[str, Any] | None:
    name = next((name for name in ("group", "heads", "kv_heads") if name in files.scores), None)
    if name is None or files.scores[name].ndim < 2:
        return None
    found = files.scores[name]
    scores, group = found.reshape(len(found), -1), found.shape[-1] if name == "group" else 1
    title = "Attention heads"
    drawn = both(lambda width: pictures.head_grid(title, scores, gone, group, width))
    caption = "layers down, heads across, as a share of the layer's strongest head"
    if 1 < group < scores.shape[1] and scores.size <= pictures.SINGLE_CELLS:
        caption += f"; gaps separate groups of {group} query heads that share a KV head"
    return {"title": title, "chart": drawn, "caption": caption, "legend": True}
