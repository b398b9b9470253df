"""Pickled weights to safetensors, on request and without running anything that a pickle asks for."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.blocks import BLOCK_BYTES, Array, Produce, Workspace
from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import INDEX, WEIGHTS, Checkpoint, read_config
from minitron_cli.checkpoint.writer import Planned, WeightFiles
from minitron_cli.config.convert import ConvertConfig
from minitron_cli.errors import CheckpointError
from minitron_cli.families import family_for
from minitron_cli.manifest import StageOutput, fingerprint, require_disk, write_json
from minitron_cli.runtime.progress import Progress, say

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ConvertResult:
    """What was written; keys of `--json`."""

    out: str
    tensors: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_convert(config: ConvertConfig) -> ConvertResult:
    """Rewrite every weights file, one at a time, and check the result against the family.

    Raises:
        UserError: no pickled weights here, they hold more than tensors, or the tensors are not the family's.
    """
    path = resolve(config.checkpoint)
    family_for(read_config(path))
    files = sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{config.checkpoint} holds no pytorch_model*.bin; there is nothing to convert.")
    output = StageOutput(config.out, "convert", config, {"checkpoint": fingerprint(path)}, force=config.force)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return ConvertResult(**output.result)
    require_disk(config.out, sum(file.stat().st_size for file in files), "The converted checkpoint")
    with output:
        copy_companions(path, output.partial)
        write_json(output.partial / "config.json", read_config(path))
        weight_map: dict[str, str] = {}
        with Progress("convert", len(files), "files") as progress:
            for number, file in enumerate(files, 1):
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else WEIGHTS
                weight_map |= dict.fromkeys(_convert_file(file, output.partial / name), name)
                progress.advance()
        checkpoint_bytes = sum(item.stat().st_size for item in output.partial.glob("*.safetensors"))
        if len(files) > 1:
            write_json(output.partial / INDEX, {"metadata": {"total_size": checkpoint_bytes}, "weight_map": weight_map})
        _ = Checkpoint(output.partial).declared
        result = ConvertResult(str(config.out), len(weight_map), checkpoint_bytes)
        output.commit(result.to_json())
    return result


def _convert_file(file: Path, out: Path) -> list[str]:
    """Write one file's tensors; returns their names."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors ({str(error).splitlines()[0][:80]}); it is left closed."
        ) from None
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    planned = [Planned(name, _NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
    WeightFiles({out: [(item, Loaded(tensors[item.name])) for item in planned]}).fill()
    return list(tensors)


@dataclass(frozen=True)
class Loaded:
    """A tensor that a file was mapped for: its pages are read when a block is made."""

    tensor: torch.Tensor

    def blocks(self) -> Iterator[tuple[int, Produce]]:
        """Runs of rows of the tensor."""
        rows = self.tensor if self.tensor.ndim else self.tensor[None]
        row_bytes = rows[:1].numel() * rows.itemsize
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for first in range(0, len(rows), step):
            yield first * row_bytes, partial(_values, rows[first : first + step])


def _values(rows: torch.Tensor, workspace: Workspace) -> Array:
    return rows.contiguous().flatten().view(torch.uint8).numpy()
