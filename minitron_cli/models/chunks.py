"""How many tokens' logits exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Bytes of fp32 logits held at once: `chunk`, enough rows for matrix products to run at full speed and no more (two
    such buffers are most of what a loss holds), and `block`, few enough for several passes over them to stay in the
    processor's cache.
    """

    chunk: int
    block: int


CPU = Sizes(80 << 20, 2 << 20)
ACCELERATOR = Sizes(512 << 20, 32 << 20)
CHUNK_TOKENS = 4096
"""Longer chunks gain nothing."""


def chunk_tokens(tokens: int, vocab: int, device: torch.device) -> int:
    """Tokens of a chunk, at most."""
    return max(1, min(tokens, CHUNK_TOKENS, _sizes(device).chunk // (4 * vocab)))


def block_tokens(vocab: int, device: torch.device) -> int:
    """Tokens of a block, at most."""
    return max(1, _sizes(device).block // (4 * vocab))


def parts(tokens: int, most: int) -> Iterator[slice]:
    """Ranges of nearly equal length that cover `tokens`, none longer than `most`."""
    count = -(-tokens // most)
    for number in range(count):
        yield slice(number * tokens // count, (number + 1) * tokens // count)


def _sizes(device: torch.device) -> Sizes:
    return CPU if device.type == "cpu" else ACCELERATOR
