"""How many sequences go through a model at once, where the user leaves that to us."""

from __future__ import annotations

from typing import Any, Literal

from minitron_cli.runtime.memory import available_bytes

MOST_ON_CPU, MOST = 4096, 1 << 17
"""Tokens of a batch, at most. A processor gains nothing from more: the states of a batch leave its cache."""

SHARE = 0.5
"""Of the memory that is free; what is left is for kernels' own buffers and for what else the device does."""


def tokens_at_once(model: Any) -> int:
    """Tokens of a batch that memory allows in a forward pass without gradients.

    Counted are the states that one layer holds at once: its input, norms, queries, keys and values, and the widest
    part of its MLP three times (gate, up, product). Attention is taken to run in blocks.
    """
    device, config = model.device, model.config.get_text_config()
    hidden = int(config.hidden_size)
    wide = max(int(getattr(config, name, None) or 0) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    each: int = (8 * hidden + 3 * max(wide, 4 * hidden)) * model.dtype.itemsize
    most = MOST_ON_CPU if device.type == "cpu" else MOST
    return max(1, min(most, int(SHARE * available_bytes(device)) // each))


def sequences_at_once(model: Any, length: int, wanted: int | Literal["auto"]) -> int:
    """Sequences of one length per forward pass."""
    return wanted if wanted != "auto" else max(1, tokens_at_once(model) // length)
