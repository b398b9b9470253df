"""The last checkpoints of a run: there is a whole one from the first save on, whatever happens to the newest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from minitron_cli.runtime.progress import say
from minitron_cli.runtime.state import load_state, save_state

CHECKSUM = "checksum"


class Checkpoints:
    """Files `state.step-NNNNNNNNN.safetensors` in a directory, the newest `keep` of them.

    `owner` tells models apart that share a directory: their files are `state.OWNER.step-...`.
    """

    def __init__(self, directory: Path, keep: int, owner: str = "") -> None:
        self.directory, self.keep, self.stem = directory, keep, f"state.{owner}.step-" if owner else "state.step-"

    def path(self, step: int) -> Path:
        """The file of one step."""
        return self.directory / f"{self.stem}{step:09d}.safetensors"

    def found(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.directory.glob(f"{self.stem}*.safetensors"))

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Write one. Older ones than `keep` go once it is on disk, and not before."""
        for torn in self.directory.glob(f"{self.stem}*.tmp"):
            torn.unlink()
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_state(self.path(step), on_cpu, {**values, CHECKSUM: checksum(on_cpu)})
        for old in self.found()[: -self.keep]:
            old.unlink()

    def newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest whole one, or None. Damaged ones are said to be so and removed: their steps run again."""
        for path in reversed(self.found()):
            try:
                state = load_state(path)
                if state is not None and state[1].pop(CHECKSUM) == checksum(state[0]):
                    return state
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                pass
            say(f"{path} is damaged and left out; going back to the checkpoint before it, or to the start.")
            path.unlink()
        return None


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
