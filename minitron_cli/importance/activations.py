"""The hidden states of all calibration sequences between two layers: in memory, or in files where they do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from minitron_cli.errors import RunError


class Activations:
    """States (rows, seq, hidden) that one layer reads and the next one's input replaces.

    Two files take turns, so that the state of the last finished layer is whole on disk at any instant: `turn` names the
    one that holds it. In memory the files are written only by `save`; on disk every layer writes the other file.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, path: Path, *, place: torch.device | None
    ) -> None:
        """`place` is the device whose memory holds the states; None keeps them in the files `path`-0 and `path`-1."""
        self.shape, self.dtype, self.turn = shape, dtype, 0
        self.files = [path.with_name(f"{path.name}-{number}") for number in (0, 1)]
        self.held = torch.empty(shape, dtype=dtype, device=place) if place is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of one full set of states."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice, device: torch.device) -> torch.Tensor:
        """Some sequences' states, (rows, seq, hidden)."""
        if self.held is not None:
            return self.held[rows].to(device)
        return self._from_file(rows).to(device)

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """The states of the same sequences after the layer."""
        if self.held is not None:
            self.held[rows] = states
        else:
            self._to_file(self.files[1 - self.turn], rows.start, states)

    def layer_done(self) -> None:
        """Every row was written: what was the output becomes the input."""
        if self.held is None:
            self.turn = 1 - self.turn

    def save(self) -> None:
        """Bring the states to disk, beside those of the last save."""
        if self.held is not None:
            for start in range(0, self.shape[0], 64):
                self._to_file(self.files[1 - self.turn], start, self.held[start : start + 64])
            self.turn = 1 - self.turn

    def restore(self, turn: int) -> None:
        """Take the states of a save back."""
        self.turn = turn
        if self.held is not None:
            for start in range(0, self.shape[0], 64):
                rows = slice(start, min(start + 64, self.shape[0]))
                self.held[rows] = self._from_file(rows).to(self.held.device)

    def _to_file(self, file: Path, start: int, states: torch.Tensor) -> None:
        size = self.nbytes // self.shape[0]
        data = states.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        with file.open("r+b" if file.exists() else "w+b", buffering=0) as stream:
            stream.seek(start * size)
            while data:
                data = data[stream.write(data) :]

    def _from_file(self, rows: slice) -> torch.Tensor:
        size = self.nbytes // self.shape[0]
        tensor = torch.empty((rows.stop - rows.start) * size, dtype=torch.uint8)
        target, file = tensor.numpy().data, self.files[self.turn]
        with file.open("rb", buffering=0) as stream:
            stream.seek(rows.start * size)
            while target:
                count = stream.readinto(target)
                if not count:
                    raise RunError(
                        f"{file} is shorter than it was written; delete the .partial directory and start again."
                    )
                target = target[count:]
        return tensor.view(self.dtype).view(-1, *self.shape[1:])
