"""A checkpoint on disk, known from its headers: every tensor's name, type, shape and place, without reading weights."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minitron_cli.errors import CheckpointError, FamilyError
from minitron_cli.families.schema import Tensor
from minitron_cli.shape import Shape

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
"""Types of weights and buffers that hold one number per element."""
PACKED = re.compile(
    r"(\.weight_scale(_inv|_2)?|\.weight_packed|\.qweight|\.qzeros|\.(absmax|quant_map)|_blocks|_scales)$"
)
"""Ends of names that quantisers write."""


@dataclass(frozen=True)
class Entry:
    """One tensor on disk; `offsets` are absolute byte positions in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.offsets[1] - self.offsets[0]

    def part(self, number: int) -> Entry:
        """One of the equal tensors that are stacked along the first dimension."""
        size = self.nbytes // self.shape[0]
        start = self.offsets[0] + number * size
        return Entry(self.name, self.file, self.dtype, self.shape[1:], (start, start + size))


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary.

    Raises:
        CheckpointError: it is absent or not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json.")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore it from the original checkpoint.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; restore it from the original checkpoint.")
    return config


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How config.json says the weights are quantised ("fp8"); None where it says nothing."""
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or not section:
        return None
    return str(section.get("quant_method") or "unnamed method")


def read_header(file: Path) -> list[Entry]:
    """The entries of one safetensors file, checked against its length.

    Raises:
        CheckpointError: the file is truncated or not safetensors.
    """
    actual = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else actual
        if 8 + length > actual:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({actual} bytes); download it again.")
        try:
            header = json.loads(stream.read(length))
            base = 8 + length
            header.pop("__metadata__", None)
            entries = [
                Entry(name, file, item["dtype"], tuple(item["shape"]), (base + start, base + end))
                for name, item in header.items()
                for start, end in [item["data_offsets"]]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{file} has a damaged safetensors header; download it again.") from None
    end = max((entry.offsets[1] for entry in entries), default=base)
    if end != actual:
        raise CheckpointError(f"{file} should hold {end} bytes and holds {actual}; it is truncated, download it again.")
    return entries


def read_into(entry: Entry, start: int, target: npt.NDArray[Any]) -> None:
    """Fill a contiguous array with the bytes of a tensor's file from position `start` on.

    A positioned read instead of a memory map: memory and address space taken are the array's, not the file's.

    Raises:
        CheckpointError: the file ends early, so it changed since its header was read.
    """
    room, done = target.reshape(-1).view(np.uint8).data, 0
    with entry.file.open("rb", buffering=0) as stream:
        while done < len(room):
            count = os.preadv(stream.fileno(), [room[done:]], start + done)
            if not count:
                raise CheckpointError(f"{entry.file} ended while {entry.name} was read; it changed, start again.")
            done += count


def read_entry(entry: Entry) -> torch.Tensor:
    """One tensor, in its own dtype, on the CPU, in memory of its own.

    Raises:
        CheckpointError: the file ends early, so it changed since its header was read.
    """
    values = np.empty(entry.nbytes, np.uint8)
    read_into(entry, entry.offsets[0], values)
    return tensor_of(values, entry.dtype, entry.shape)


def tensor_of(values: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Contiguous bytes as a tensor of a type named as in safetensors headers; memory is shared."""
    import torch

    from minitron_cli.checkpoint.dtypes import TORCH_DTYPES

    return torch.from_numpy(values.reshape(-1).view(np.uint8)).view(TORCH_DTYPES[dtype]).view(shape)


class Checkpoint:
    """A local checkpoint directory with weights.

    >>> checkpoint = Checkpoint(resolve("builtin:tiny-py"))
    >>> checkpoint.shape.params
    1443456
    """

    def __init__(self, path: Path) -> None:
        """Read config and headers.

        Raises:
            CheckpointError: no config, no safetensors, a damaged file.
            FamilyError, ShapeError: from the config.
        """
        self.path = path
        self.config = self._read_config()
        self.shape = Shape.of(self.config)
        self.entries: Mapping[str, Entry] = self._by_declared_name(
            [entry for file in self._files() for entry in read_header(file)]
        )
        self.shape = replace(self.shape, family=self.shape.family.as_stored(self.entries))

    def _read_config(self) -> dict[str, Any]:
        return read_config(self.path)

    def _by_declared_name(self, entries: list[Entry]) -> dict[str, Entry]:
        """Entries under the names the family declares; published files may lack its module prefix throughout."""
        prefix = self.shape.family.prefix
        if not prefix or any(entry.name.startswith(prefix) for entry in entries):
            return {entry.name: entry for entry in entries}
        declared = {name for name, _, _ in self.shape.family.expected(self.config)}
        return {prefix + e.name if prefix + e.name in declared else e.name: e for e in entries}

    def _files(self) -> list[Path]:
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        index = self.path / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                raise CheckpointError(f"{index} is damaged; download it again.") from None
            for name in names:
                if not (self.path / name).is_file():
                    raise CheckpointError(f"{self.path} lacks {name}, which its index names; finish the download.")
            return [self.path / name for name in names]
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")):
            raise CheckpointError(
                f"{self.path} holds pickled weights only, which can run code when opened; "
                f"rewrite them with `minitron convert {self.path} --out DIR`."
            )
        raise CheckpointError(f"{self.path} has a config.json but no safetensors weights.")

    def require_unquantised(self) -> None:
        """Insist on plain weights: packed values cannot be cut, scored or trained.

        Raises:
            CheckpointError: config.json says that they are quantised, or the files do.
        """
        method = quantisation(self.config)
        if method is None:
            # Masks of legacy files are bytes too, and mean nothing.
            odd = (each for each in self.entries.values() if each.dtype not in PLAIN or PACKED.search(each.name))
            found = next((each for each in odd if not self._skipped(each.name)), None)
            method = None if found is None else f"{found.dtype} {found.name}"
        if method is not None:
            raise CheckpointError(
                f"{self.path} holds quantised weights ({method}), which cannot be cut; take the bf16 checkpoint of the "
                "same model, or dequantise this one to bf16 first."
            )

    @cached_property
    def declared(self) -> dict[str, tuple[Tensor, int | None]]:
        """Each tensor on disk with its declaration and layer, checked in both directions.

        Ignored, dropped and tied-copy tensors are left out.

        Raises:
            CheckpointError: the weights are quantised.
            FamilyError: a tensor is undeclared, missing, or has another size than the config says.
        """
        self.require_unquantised()
        family, sizes = self.shape.family, self.shape.sizes
        expected = {name: (tensor, layer) for name, tensor, layer in family.expected(self.config)}
        for name, (tensor, _) in expected.items():
            if name not in self.entries:
                if tensor.role == "buffer":
                    continue
                raise FamilyError(f"{self.path} lacks tensor {name}, which a {family.name} checkpoint must hold.")
            shape = family.tensor_shape(tensor, sizes)
            if self.entries[name].shape != shape:
                raise FamilyError(
                    f"{name} has shape {list(self.entries[name].shape)} and config.json says {list(shape)}; "
                    "config and weights do not belong together."
                )
        for name in self.entries.keys() - expected.keys():
            if not self._skipped(name):
                raise FamilyError(f"No line of the {family.name} family explains tensor {name}; refusing to drop it.")
        return {name: item for name, item in expected.items() if name in self.entries}

    def _skipped(self, name: str) -> bool:
        family = self.shape.family
        full_name = family.prefix + name
        ignored = any(re.fullmatch(pattern, candidate) for pattern in family.ignored for candidate in (name, full_name))
        return ignored or name in family.tied or family.dropped_notice(name, self.shape["layers"]) is not None

    def dropped(self) -> dict[str, int]:
        """Notices of the family's dropped tensors present here, with how many tensors each covers."""
        counts: dict[str, int] = {}
        for name in self.entries:
            notice = self.shape.family.dropped_notice(name, self.shape["layers"])
            if notice is not None:
                counts[notice] = counts.get(notice, 0) + 1
        return counts

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype, on the CPU."""
        return read_entry(self.entries[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(entry.nbytes for entry in self.entries.values())
