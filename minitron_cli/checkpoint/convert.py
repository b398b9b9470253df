"""Pickled weights to safetensors, on request and without running anything that a pickle asks for."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import INDEX, TORCH_DTYPES, WEIGHTS, Checkpoint, read_config
from minitron_cli.checkpoint.writer import Planned, write_file
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
    write_file(out, planned, lambda name: tensors[name])
    return list(tensors)
