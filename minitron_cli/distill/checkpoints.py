"""The last checkpoints of a run: there is a whole one from the first save on, whatever happens to the newest.

One process writes a file, `state.step-NNNNNNNNN.safetensors`; several write a directory of that name without the
ending, each its own parts, with torch.distributed.checkpoint in its safetensors format. Any number reads either.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minitron_cli.manifest import sync_directory, write_json
from minitron_cli.models.split import is_split
from minitron_cli.runtime.group import Group
from minitron_cli.runtime.progress import say
from minitron_cli.runtime.state import load_state, save_state

CHECKSUM = "checksum"
VALUES = "values.json"
"""In a directory of parts: what is no tensor, and checksums of the other files. Written last."""
Saved = Mapping[str, torch.Tensor]
"""Tensors of a checkpoint by name; `fill` takes them without holding more than one whole tensor that is split."""


class Checkpoints:
    """Files or directories `state.step-NNNNNNNNN...` in a directory, the newest `keep` of them.

    `owner` tells models apart that share a directory: their files are `state.OWNER.step-...`. With a group of several
    processes, all of them call each method.
    """

    def __init__(self, directory: Path, keep: int, owner: str = "", group: Group | None = None) -> None:
        self.directory, self.keep, self.stem = directory, keep, f"state.{owner}.step-" if owner else "state.step-"
        self.group = group or Group()

    def path(self, step: int) -> Path:
        """What this number of processes writes of one step."""
        ending = ".safetensors" if self.group.size == 1 else ""
        return self.directory / f"{self.stem}{step:09d}{ending}"

    def found(self) -> list[Path]:
        """Oldest first."""
        whole = re.compile(re.escape(self.stem) + r"\d+(\.safetensors)?")
        return sorted(each for each in self.directory.glob(f"{self.stem}*") if whole.fullmatch(each.name))

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Write one. Older ones than `keep` go once it is on disk, and not before."""
        if self.group.main:
            for torn in self.directory.glob(f"{self.stem}*.tmp"):
                remove(torn)
        if self.group.size == 1:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_state(self.path(step), on_cpu, {**values, CHECKSUM: checksum(on_cpu)})
        else:
            self._save_parts(self.path(step), tensors, values)
        if self.group.main:
            for old in self.found()[: -self.keep]:
                remove(old)

    def _save_parts(self, path: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        unfinished = path.with_name(path.name + ".tmp")
        self.group.wait()
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
        self.group.wait()
        sums = torch.zeros(len(files := _parts(unfinished)), dtype=torch.int64)
        for number in range(len(files))[self.group.part]:
            sums[number] = _checksum_of_file(files[number])
        sums = self.group.total(sums)
        if self.group.main:
            named = dict(zip((file.name for file in files), sums.tolist(), strict=True))
            write_json(unfinished / VALUES, {**values, CHECKSUM: named})
            if path.exists():  # of the same step, so the same
                remove(unfinished)
            else:
                os.replace(unfinished, path)
            sync_directory(self.directory)
        self.group.wait()

    def newest(self) -> tuple[Saved, dict[str, Any]] | None:
        """The newest whole one, or None. Damaged ones are said to be so and removed: their steps run again."""
        for path in reversed(self.group.from_main(self.found())):
            state = self._parts_of(path) if path.is_dir() else self._file(path)
            if state is not None:
                return state
            if self.group.main:
                say(f"{path} is damaged and left out; going back to the checkpoint before it, or to the start.")
                remove(path)
            self.group.wait()
        return None

    def _file(self, path: Path) -> tuple[Saved, dict[str, Any]] | None:
        state = None
        if self.group.main:  # reads all of it; the others, tensor by tensor
            try:
                state = load_state(path)
                state = state if state is not None and state[1].pop(CHECKSUM) == checksum(state[0]) else None
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                state = None
        values = self.group.from_main(None if state is None else state[1])
        if values is None:
            return None
        return (state[0] if state is not None else _File(path)), values

    def _parts_of(self, path: Path) -> tuple[Saved, dict[str, Any]] | None:
        try:
            values: dict[str, Any] | None = json.loads((path / VALUES).read_text("utf-8"))
            assert values is not None
            sums, files = values.pop(CHECKSUM), _parts(path)
            mine = range(len(files))[self.group.part]
            good = sums.keys() == {file.name for file in files}
            good = good and all(_checksum_of_file(files[n]) == sums[files[n].name] for n in mine)
        except (OSError, ValueError, KeyError, AttributeError):
            good, values = False, None
        if self.group.any(not good) or values is None:
            return None
        return _Parts(path, alone=self.group.size == 1), values


class _File(Saved):
    """A file of whole tensors, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")

    def __contains__(self, name: object) -> bool:
        return name in self._file.keys()  # noqa: SIM118 (not a dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


class _Parts(Saved):
    """A directory of parts, read by torch.distributed.checkpoint into tensors that may be split otherwise."""

    def __init__(self, path: Path, *, alone: bool) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self.path, self.alone = path, alone
        self._known = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> torch.Tensor:
        known: Any = self._known[name]
        tensor = torch.empty(known.size, dtype=known.properties.dtype)
        self.into({name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def into(self, targets: dict[str, Any]) -> None:
        """Overwrite tensors with those of their names."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(self.path))
        with warnings.catch_warnings():  # it says that there is one process
            warnings.simplefilter("ignore", UserWarning)
            load(targets, storage_reader=reader, no_dist=self.alone)


@torch.no_grad()
def fill(targets: Mapping[str, torch.Tensor], saved: Saved) -> None:
    """Overwrite tensors, whole or split, with a checkpoint's of the same names; every process must call it."""
    if isinstance(saved, _Parts):
        saved.into({name: target.detach() for name, target in targets.items()})
        return
    for name, target in targets.items():
        whole = saved[name]
        if is_split(target):
            from torch.distributed.tensor import distribute_tensor

            split: Any = target
            whole = whole.to(split.device_mesh.device_type)
            part = distribute_tensor(whole, split.device_mesh, split.placements, src_data_rank=None).to_local()
            split.to_local().copy_(part)
        else:
            target.copy_(whole)


def remove(path: Path) -> None:
    """Delete a checkpoint of either kind, finished or not; half a directory is never taken for one."""
    if path.is_dir():
        if not path.name.endswith(".tmp"):
            path = path.rename(path.with_name(path.name + ".tmp"))
        shutil.rmtree(path)
    else:
        path.unlink()


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _checksum_of_file(path: Path) -> int:
    found = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of CPU tensors' bytes and names: a file of the right length may still hold what a power cut left.

    A file system may bring back a file whose last pages were never written; the format itself checks lengths only.
    """

    def of(name: str) -> int:
        data = tensors[name].flatten().view(torch.uint8).numpy()
        return zlib.crc32(data, zlib.crc32(name.encode()))  # type: ignore[arg-type]

    with ThreadPoolExecutor() as pool:  # crc32 lets other threads run
        parts = list(pool.map(of, sorted(tensors)))
    return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))
