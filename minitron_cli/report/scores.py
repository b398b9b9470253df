"""The section of importance scores: layers, neurons, hidden channels, heads."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from minitron_cli.report import pictures
from minitron_cli.report.format import count, number
from minitron_cli.report.gather import Array, RunFiles, removed_layers, table
from minitron_cli.report.svg import both

LAYER_SCORES = (
    (
        "layers.bi",
        "Block importance",
        "1 − cosine similarity of a layer's input and output; where it is low the layer changes little",
    ),
    (
        "layers.loss",
        "Loss increase without the layer",
        "nats per token on calibration text when this one layer is skipped",
    ),
)


def importance(files: RunFiles) -> dict[str, Any] | None:
    """Layer scores as bars, neuron and channel scores as strips, heads as a grid."""
    gone = removed_layers(files)
    figures = []
    for name, title, caption in LAYER_SCORES:
        if (values := files.scores.get(name)) is not None and values.ndim == 1:
            figures.append({"title": title, "chart": _bars(title, values, gone), "caption": caption, "legend": False})
    figures += [figure for figure in (_neurons(files, gone), _hidden(files), _heads(files, gone)) if figure is not None]
    if not figures:
        return None
    result = files.result("importance")
    return {
        "figures": figures,
        "legend": pictures.legend(),
        "samples": count(result.get("samples")),
        "tokens": count(result.get("tokens")),
    }


def _bars(title: str, values: Array, gone: list[int]) -> Markup:
    return both(lambda width: pictures.layer_bars(title, values, gone, width))


def _kept(files: RunFiles, axis: str) -> float | None:
    """The share of an axis that stays, where it is cut."""
    before, after = (number(table((files.plan or {}).get(key)).get(axis)) for key in ("sizes_before", "sizes"))
    return after / before if before and after is not None and after < before else None


def _neurons(files: RunFiles, gone: list[int]) -> dict[str, Any] | None:
    name = next((name for name in ("ffn", "expert_ffn") if name in files.scores and files.scores[name].ndim >= 2), None)
    if name is None:
        return None
    scores = files.scores[name]
    rows = [pictures.Strip(str(layer), values.reshape(-1), layer in gone) for layer, values in enumerate(scores)]
    title = "FFN neurons, layer by layer"
    drawn = both(lambda width: pictures.strips(title, rows, _kept(files, name), width))
    caption = "each layer's neurons from strongest to weakest, as a share of the layer's 99th percentile"
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
