"""The network before and after the cut as one picture: areas are parameters, what left is an outline.

A layer is a row of two blocks, attention and MLP. A block is as wide as the channels of its heads, or its neurons,
times the matrices that have them, and as high as the hidden size: its area is its number of weights. So is the area of
the vocabulary's block below, up to a height of four layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from minitron_cli.drawing.format import count
from minitron_cli.drawing.svg import chart, el, text

Sizes = Mapping[str, float]

HEIGHT = 400.0
"""Of all layers together, about."""

APART, QUIET = 5.0, 16.0
"""Heads narrower than the first are not drawn apart; rows lower than the second have outlines without a line."""

GAP = 10.0


@dataclass(frozen=True)
class Column:
    """Where one network stands: its left edge, the width that the whole network's rows take, the rows' height."""

    left: float
    width: float
    pitch: float
    top: float


def attention_width(sizes: Sizes) -> float:
    """Rows of the four matrices of attention, as multiples of the hidden size."""
    heads, head_dim = sizes.get("heads", 0), sizes.get("head_dim", 0)
    return 2 * head_dim * (heads + sizes.get("kv_heads", heads))


def mlp_width(sizes: Sizes) -> float:
    """Rows of the three matrices of the MLP, or of all experts'."""
    neurons = sizes.get("ffn", 0)
    if "experts" in sizes:
        neurons = sizes["experts"] * sizes.get("expert_ffn", neurons)
    return 3 * neurons


def network(before: Sizes, after: Sizes, gone: Sequence[int], width: int) -> Markup | None:
    """Both networks side by side, the first layer at the bottom; None where the sizes are not of such a network.

    Args:
        before, after: sizes by axis.
        gone: layers that were removed.
    """
    whole = attention_width(before) + mlp_width(before)
    if not (before.get("layers") and before.get("hidden") and whole and after.get("hidden")):
        return None
    layers, label = int(before["layers"]), 26.0
    each = (width - 3 * GAP) / 2
    pitch = min(HEIGHT / layers, 46.0)
    inner = each - label - GAP
    vocabulary = before.get("vocab", 0.0) / whole * (pitch - 1) * (inner + GAP) / inner
    low = min(vocabulary, 4 * pitch)
    top, bottom = 30.0, 30.0 + layers * pitch
    parts = []
    for place, (title, sizes) in enumerate((("before", before), ("after", after))):
        column = Column(GAP + place * (each + GAP) + label, inner, pitch, top)
        parts.append(text(column.left, 18, title, class_="name"))
        kept = [layer for layer in range(layers) if not place or layer not in gone]
        parts += _layers(column, layers, kept, before, sizes)
        if low >= 2:
            parts += _vocabulary(column, bottom + 6, low, before, sizes)
    height = bottom + (low + 8 if low >= 2 else 0) + 4
    return chart(width, height, _told(before, after, gone), parts)


def _layers(column: Column, layers: int, kept: Sequence[int], before: Sizes, sizes: Sizes) -> list[Markup]:
    """All rows of one network, the first layer lowest; layers that left and narrower ones inside the old outline."""
    whole = attention_width(before) + mlp_width(before)
    unit, gap = column.width / whole, 1.0 if column.pitch < 8 else 3.0
    full = column.pitch - gap
    high = full * min(sizes["hidden"] / before["hidden"], 1.0)
    every = max(1, int(-(-14 // column.pitch)))
    parts = []
    for layer in range(layers):
        y = column.top + (layers - 1 - layer) * column.pitch
        there = layer in kept
        if layer % every == 0:
            name = text(column.left - 6, y + full / 2 + 4, layer, anchor="end", class_=None if there else "gone")
            parts.append(name)
        split = column.left + attention_width(before) * unit
        old = (column.left, attention_width(before) * unit), (split + GAP / 2, mlp_width(before) * unit)
        new = attention_width(sizes) * unit, mlp_width(sizes) * unit
        for (x, was), now, kind in zip(old, new, ("attention", "mlp"), strict=True):
            tip = el("title", f"layer {layer}, {kind}{'' if there else ': removed'}")
            if not there or now < was - 0.5 or high < full - 0.5:
                outline = "outline quiet" if column.pitch < QUIET else "outline"
                parts.append(el("rect", tip, x=x, y=y, width=was, height=full, class_=outline))
            if there:
                parts.append(el("rect", tip, x=x, y=y + full - high, width=now, height=high, class_=kind))
        if there and column.pitch >= 8:
            parts += _heads(column.left, y + full - high, new[0], high, sizes)
    return parts


def _heads(left: float, y: float, width: float, height: float, sizes: Sizes) -> list[Markup]:
    """Lines between the query heads of a block, stronger ones where another KV head begins; between groups of heads
    alone where single ones would be too narrow.
    """
    heads = int(sizes.get("heads", 0))
    groups = int(sizes.get("kv_heads", heads) or heads)
    drawn = heads if heads and width / heads >= APART else groups if groups and width / groups >= APART else 0
    every = max(1, drawn // groups) if groups else 1
    places = ((place, left + width * place / drawn) for place in range(1, drawn))
    return [
        el("line", x1=x, x2=x, y1=y, y2=y + height, class_="between" if place % every == 0 else "between thin")
        for place, x in places
    ]


def _vocabulary(column: Column, y: float, low: float, before: Sizes, sizes: Sizes) -> list[Markup]:
    """The embeddings below the first layer."""
    wide = column.width + GAP / 2
    part = wide * min(sizes.get("vocab", 0) / max(before.get("vocab", 0), 1), 1.0)
    high = low * min(sizes["hidden"] / before["hidden"], 1.0)
    tip = el("title", f"embeddings of {count(sizes.get('vocab'))} words")
    outline = el("rect", tip, x=column.left, y=y, width=wide, height=low, class_="outline")
    block = el("rect", tip, x=column.left, y=y + low - high, width=part, height=high, class_="embedding")
    return [outline, block] if high < low - 0.5 or part < wide - 0.5 else [block]


def _told(before: Sizes, after: Sizes, gone: Sequence[int]) -> str:
    """The picture in words."""
    names = {"layers": "layers", "hidden": "hidden channels", "ffn": "neurons", "heads": "query heads",
             "kv_heads": "KV heads", "experts": "experts"}  # fmt: skip
    lists = [
        ", ".join(f"{count(sizes[name])} {what}" for name, what in names.items() if name in sizes)
        for sizes in (before, after)
    ]
    left = f" Layers that left: {', '.join(map(str, gone))}." if gone else ""
    return f"The network before: {lists[0]}. After: {lists[1]}.{left}"
