"""Write safetensors files block by block: headers are known before the first byte, blocks land where they belong."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_cli.checkpoint.blocks import Array, Produce, Source, Workspace, all_finite
from minitron_cli.checkpoint.reader import INDEX, WEIGHTS
from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import BYTES
from minitron_cli.manifest import write_json

SHARD_BYTES = 5_000_000_000

WORKERS = 4
"""Blocks in flight: enough that the disk is busy while others are cut, few enough for a small memory."""


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


@dataclass(frozen=True)
class _Job:
    """One block on its way: into which file, at which position."""

    file: Path
    tensor: Planned
    position: int
    produce: Produce


class WeightFiles:
    """Safetensors files that have their headers and final sizes from the start, and are then filled."""

    def __init__(self, files: Mapping[Path, Sequence[tuple[Planned, Source]]]) -> None:
        """Create the files; their structure can be read at once, their values only when they are filled."""
        self._files = files
        self._starts = {path: _create(path, [item for item, _ in tensors]) for path, tensors in files.items()}

    def fill(
        self, on_bytes: Callable[[int], None] = lambda count: None, *, finite: bool = False, workers: int = WORKERS
    ) -> None:
        """Copy every block; several are in flight. `on_bytes` hears of progress, one call at a time.

        Raises:
            CheckpointError: an input file ended early; with `finite`, a value is NaN or infinite.
            Whatever `on_bytes` raises, which stops the work.
        """
        jobs, lock, stop = self._jobs(), threading.Lock(), threading.Event()

        def work() -> None:
            workspace = Workspace()
            try:
                while not stop.is_set():
                    with lock:
                        job = next(jobs, None)
                    if job is None:
                        return
                    count = _copy(job, workspace, finite)
                    with lock:
                        on_bytes(count)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(work) for _ in range(workers)]
            try:
                for each in running:
                    each.result()
            finally:
                stop.set()

    def place(self, name: str, values: Array) -> None:
        """Write the whole of one tensor, whose source then gives no blocks."""
        for path, tensors in self._files.items():
            start = self._starts[path]
            for planned, _ in tensors:
                if planned.name == name:
                    assert values.nbytes == planned.nbytes, name
                    write_at(path, start, values)
                    return
                start += planned.nbytes
        raise KeyError(name)

    def _jobs(self) -> Iterator[_Job]:
        for path, tensors in self._files.items():
            start = self._starts[path]
            for planned, source in tensors:
                for place, produce in source.blocks():
                    yield _Job(path, planned, start + place, produce)
                start += planned.nbytes


def weight_files(
    directory: Path, tensors: Sequence[tuple[Planned, Source]], *, shard_bytes: int = SHARD_BYTES
) -> WeightFiles:
    """`model.safetensors`, or shards with an index when the tensors exceed `shard_bytes`, still to be filled."""
    shards = split_shards([planned for planned, _ in tensors], shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        total = sum(planned.nbytes for planned, _ in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    rest = iter(tensors)
    return WeightFiles(
        {directory / name: [next(rest) for _ in shard] for name, shard in zip(names, shards, strict=True)}
    )


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


def _create(path: Path, planned: Sequence[Planned]) -> int:
    """Header and size of one file; returns where its data starts, padded to a multiple of 8 bytes."""
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
        stream.truncate(8 + len(text) + offset)
    return 8 + len(text)


def _copy(job: _Job, workspace: Workspace, finite: bool) -> int:
    """Make one block and write it; returns its bytes."""
    values = job.produce(workspace)
    if finite and not all_finite(values, job.tensor.dtype):
        raise not_finite(job.tensor.name, job.file, job.tensor.dtype)
    return write_at(job.file, job.position, values)


def not_finite(name: str, file: Path, dtype: str) -> CheckpointError:
    """What is said of a tensor with NaN or infinity."""
    return CheckpointError(
        f"{name} in {file} holds values that are not finite; the weights are damaged, or overflowed in {dtype}."
    )


def write_at(file: Path, position: int, values: Array) -> int:
    """Replace the bytes of a file from a position on; returns how many."""
    data, done = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, 0
    with file.open("r+b", buffering=0) as stream:
        while done < len(data):
            done += os.pwrite(stream.fileno(), data[done:], position + done)
    return done
