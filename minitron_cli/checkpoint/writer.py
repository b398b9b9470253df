"""Write safetensors files tensor by tensor: the header is known before the first byte, memory is one tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_cli.checkpoint.reader import INDEX, TORCH_DTYPES, WEIGHTS
from minitron_cli.families.schema import BYTES
from minitron_cli.manifest import write_json

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        total = BYTES[self.dtype]
        for length in self.shape:
            total *= length
        return total


def write_weights(
    directory: Path,
    planned: Sequence[Planned],
    read: Callable[[str], torch.Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write all tensors to `model.safetensors`, or to shards with an index when they exceed `shard_bytes`.

    `read(name)` supplies each tensor when its turn comes; `on_bytes` hears of progress.
    """
    shards = split_shards(planned, shard_bytes)
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0], read, on_bytes)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, read, on_bytes)
        weight_map |= {item.name: name for item in shard}
    total = sum(item.nbytes for item in planned)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def split_shards(planned: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Consecutive runs of tensors of at most `shard_bytes` each (a larger tensor gets a shard of its own)."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for item in planned:
        if shards[-1] and filled + item.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    return shards


def write_file(
    path: Path,
    planned: Sequence[Planned],
    read: Callable[[str], torch.Tensor],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """One safetensors file; the header is padded so that tensor data starts at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in planned:
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for item in planned:
            tensor = read(item.name)
            if tuple(tensor.shape) != item.shape or tensor.dtype != TORCH_DTYPES[item.dtype]:
                raise AssertionError(f"{item.name}: planned {item}, got {tensor.dtype} {list(tensor.shape)}")
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            on_bytes(item.nbytes)
