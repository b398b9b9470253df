"""Things that load but will trouble serving: warnings with reasons, from the shape and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import lookup
from minitron_cli.shape import Shape

K_QUANT_BLOCK = 256
TENSOR_PARALLEL = (2, 4, 8)
TILE, FP8_BLOCK = 64, 128
WIDTHS = ("hidden", "ffn", "expert_ffn", "shared_ffn")
"""Axes along which matrices have rows of weights that kernels and quantisers cut into blocks."""


def serving_warnings(shape: Shape, path: Path) -> list[str]:
    """All warnings about a checkpoint of this shape in this directory."""
    return [*_row_warnings(shape), *_head_warnings(shape), *_width_warnings(shape), *_token_warnings(shape, path)]


def rows(shape: Shape) -> dict[str, int]:
    """Lengths of the rows that matrices multiply with, by name; axes of size 0 mean that there is no such matrix."""
    found = {name: shape[name] for name in WIDTHS if shape.sizes.get(name) and name not in shape.absent}
    if "heads" in shape.sizes:
        channels = next((name for name in ("v_head_dim", "head_dim") if name in shape.sizes), None)
        if channels is not None:
            found[f"heads*{channels}"] = shape["heads"] * shape[channels]
    return found


def _row_warnings(shape: Shape) -> Iterator[str]:
    odd = [f"{name} {size:,}" for name, size in rows(shape).items() if size % K_QUANT_BLOCK]
    if odd:
        yield (
            f"rows of {', '.join(odd)} are no multiple of {K_QUANT_BLOCK}: llama.cpp's K-quants pack rows in blocks of "
            f"{K_QUANT_BLOCK}, and such tensors fall back to a larger type"
        )


def _head_warnings(shape: Shape) -> Iterator[str]:
    sizes = shape.sizes
    if "heads" in sizes:
        uneven = [str(ways) for ways in TENSOR_PARALLEL if sizes["heads"] % ways]
        if uneven:
            yield (
                f"{sizes['heads']} heads do not divide by {', '.join(uneven)}: tensor parallelism gives every device "
                "whole heads"
            )
    if sizes.get("experts") and "experts" not in shape.absent:
        uneven = [str(ways) for ways in TENSOR_PARALLEL if sizes["experts"] % ways]
        if uneven:
            yield (
                f"{sizes['experts']} experts do not divide by {', '.join(uneven)}: expert parallelism gives every "
                "device whole experts"
            )
    if sizes.get("kv_heads"):
        # Fewer KV heads than devices are copied, where they divide.
        uneven = [str(n) for n in TENSOR_PARALLEL if sizes["kv_heads"] % n and n % sizes["kv_heads"]]
        if uneven:
            yield (
                f"{sizes['kv_heads']} KV heads neither divide by {', '.join(uneven)} nor divide it: tensor parallelism "
                "splits KV heads over devices, or copies them evenly"
            )


def _width_warnings(shape: Shape) -> Iterator[str]:
    widths = rows(shape)
    odd = [f"{name} {size:,}" for name, size in widths.items() if size % TILE]
    if odd:
        yield f"{', '.join(odd)} are no multiple of {TILE}: GPU kernels work in such tiles and waste the rest"
    halves = [f"{name} {size:,}" for name, size in widths.items() if size % TILE == 0 and size % FP8_BLOCK]
    if halves:
        yield (
            f"{', '.join(halves)} are no multiple of {FP8_BLOCK}: fp8 quantisation in blocks of "
            f"{FP8_BLOCK}x{FP8_BLOCK} does not fit"
        )
    head_dim = shape.sizes.get("head_dim")
    if head_dim and head_dim % 16:
        yield f"head_dim {head_dim} is no multiple of 16: fused attention kernels pad it or refuse"
    if shape["vocab"] % TILE:
        yield (
            f"vocab {shape['vocab']:,} is no multiple of {TILE}: the largest matrix, that of the logits, runs in "
            "incomplete tiles"
        )


def _token_warnings(shape: Shape, path: Path) -> Iterator[str]:
    from minitron_cli.models.tokenizer import load_tokenizer, vocabulary_size

    vocab = shape["vocab"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = lookup(shape.config, name)
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, int) and token >= vocab:
                yield f"{name} {token} is outside the vocabulary of {vocab:,}: whoever embeds it crashes"
    try:
        known = vocabulary_size(load_tokenizer(str(path)))
    except CheckpointError as error:
        missing = "holds no tokenizer files" in str(error)
        yield "no tokenizer beside the weights: servers want one" if missing else str(error)
        return
    if known > vocab:
        yield f"the tokenizer has {known:,} tokens and the model {vocab:,}: the highest ids crash the embedding"
    elif known < vocab:
        yield (
            f"{vocab - known:,} of {vocab:,} ids are padding that the tokenizer does not know: "
            "a sampler that picks one cannot decode it"
        )
