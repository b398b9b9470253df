"""Measure paths with removed layers over calibration sequences: in memory or streamed, resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import InputError, RunError
from minitron_cli.importance.compare import compare
from minitron_cli.importance.layout import Array
from minitron_cli.importance.paths import FULL, Leg, Model, Removed, before, carry, legs
from minitron_cli.models.streaming import StreamedModel
from minitron_cli.runtime.group import Group
from minitron_cli.runtime.memory import available_bytes
from minitron_cli.runtime.progress import Progress, byte_size, say
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.tokens import Split

Scores = dict[str, Array]
"""Measure (loss, kl, mse, task) to one value per path; higher means that more is lost."""


class Journal:
    """All that was measured so far, saved after every leg: a killed run ends with the same bytes.

    A pass scores one list of paths; its sums are this process's own. `batches` and `paths` say how far the last pass
    is: that many sets of batches are done, and of the next one that many paths. `tasks` are task scores by path.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.passes: list[torch.Tensor] = []
        self.batches = self.paths = 0
        self.tasks: dict[str, float] = {}
        saved = load_state(file)
        if saved is not None:
            tensors, values = saved
            self.passes = [tensors[str(number)] for number in range(len(tensors))]
            self.batches, self.paths, self.tasks = values["batches"], values["paths"], values["tasks"]

    def save(self) -> None:
        """Replace the file."""
        values = {"batches": self.batches, "paths": self.paths, "tasks": self.tasks}
        save_state(self.file, {str(number): sums for number, sums in enumerate(self.passes)}, values)


class Removals:
    """Measures paths over this process's sequences.

    With all layers in memory one batch at a time is carried along the paths; streamed, all sequences at once, so that
    a layer is read once for as many paths as fit. Either way every path's sums are taken in the same order.
    """

    def __init__(
        self, model: Model, split: Split, rows: list[int], config: ImportanceConfig, journal: Journal, group: Group
    ) -> None:
        self.model, self.split, self.config, self.journal, self.group = model, split, config, journal, group
        self.device = next(model.model.parameters()).device
        batches = [rows[first : first + config.batch_size] for first in range(0, len(rows), config.batch_size)]
        self.streamed = isinstance(model, StreamedModel)
        self.carried = [batches] if self.streamed and batches else [[batch] for batch in batches]
        self.passes = 0
        self.full_loss = math.nan

    def measure(self, paths: Sequence[Removed], *, trunk: Removed = FULL, title: str = "depth") -> Scores:
        """Every measure of every path, (paths,).

        Raises:
            InputError: no token is a target.
            RunError: a loss is not a number.
        """
        if self.passes == len(self.journal.passes):
            self.journal.passes.append(torch.zeros(1 + len(paths), 3, dtype=torch.float64))
            self.journal.batches = self.journal.paths = 0
        sums = self.journal.passes[self.passes]
        self.passes += 1
        if self.passes == len(self.journal.passes):
            self._finish(sums, paths, trunk, title)
        totals = self.group.total(sums)
        loss, tokens, squares = totals[0].tolist()
        if tokens == 0:
            raise InputError(f"No token of the {self.split.name} split is a target; prepare the data with more text.")
        if not bool(totals.isfinite().all()):
            raise RunError("The loss without some layers is not a finite number; try --dtype float32.")
        self.full_loss = loss / tokens
        found = totals[1:].numpy()
        return {"loss": (found[:, 0] - loss) / tokens, "kl": found[:, 1] / tokens, "mse": found[:, 2] / squares}

    def _finish(self, sums: torch.Tensor, paths: Sequence[Removed], trunk: Removed, title: str) -> None:
        """Do what is left of the last pass."""
        together = self._together(len(paths))
        if self.passes == 1:
            say(self._plan(paths, trunk, together))
        whole = self._work(legs(paths, trunk, together))
        left = whole * sum(len(rows) for batches in self.carried[self.journal.batches + 1 :] for rows in batches)
        for batches in self.carried[self.journal.batches : self.journal.batches + 1]:
            left += self._work(legs(paths[self.journal.paths :], trunk, together)) * sum(map(len, batches))
        total = whole * sum(len(rows) for batches in self.carried for rows in batches)
        unit = "sequences x layers"
        with (
            Progress(title, total, unit, start=total - left, rate_unit="tokens x layers") as progress,
            torch.inference_mode(),
        ):
            for batches in self.carried[self.journal.batches :]:
                self._walk(sums, batches, legs(paths[self.journal.paths :], trunk, together), progress)
                self.journal.batches, self.journal.paths = self.journal.batches + 1, 0
                self.journal.save()

    def _walk(self, sums: torch.Tensor, batches: list[list[int]], walks: list[Leg], progress: Progress) -> None:
        """Add what all legs find on some batches."""
        ids = [torch.from_numpy(self.split.rows(rows)).to(self.device) for rows in batches]
        states = {FULL: [self.model.enter(each) for each in ids]}
        full: list[torch.Tensor] = []
        for leg in walks:
            ended, kept = carry(
                self.model, leg, states, lambda hidden: progress.advance(len(hidden), rated=hidden[..., 0].numel())
            )
            states = {before(leg.trunk, leg.keep): kept} if leg.keep is not None else {}
            full = ended.pop(FULL, full)
            done = self.journal.paths
            for batch, rows in enumerate(batches):
                chosen = torch.from_numpy(self.split.targets(rows)[:, 1:]).to(self.device)
                # Popped, so that states which were compared make room.
                others = (hidden.pop(0) for hidden in ended.values())
                found = compare(self.model, full[batch], others, ids[batch], chosen)
                if done == 0:
                    sums[0] += found[0]
                sums[1 + done : done + len(found)] += found[1:]
            self.journal.paths += len(ended)
            if leg.keep is not None:
                self.journal.save()

    def _together(self, paths: int) -> int:
        """How many paths fit the memory, beside the whole model's and the next leg's beginning; at least one."""
        budget = self.config.carry_bytes or available_bytes(self.device) // 4
        return min(paths, max(1, budget // max(self._state_bytes(), 1) - 2))

    def _state_bytes(self) -> int:
        """Hidden states of one path."""
        with torch.inference_mode():
            token = self.model.enter(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        sequences = max((sum(map(len, batches)) for batches in self.carried), default=0)
        return int(token.nbytes * sequences * self.split.tokens.shape[1])

    def _work(self, walks: list[Leg]) -> int:
        """Layers run per sequence."""
        return sum(len(leg.through(number)) for leg in walks for number in range(leg.start, len(self.model.layers)))

    def _plan(self, paths: Sequence[Removed], trunk: Removed, together: int) -> str:
        walks, layers = legs(paths, trunk, together), len(self.model.layers)
        size = byte_size((together + 2) * self._state_bytes())
        text = f"Depth: {len(paths)} paths, {together} carried at a time ({size})"
        if self.streamed:
            read = sum(bool(leg.through(number)) for leg in walks for number in range(leg.start, layers))
            times = "once" if len(walks) == 1 else f"{len(walks)} times"
            text += f", the model is read {times} ({read} layers; it has {layers})"
        return text + "."
