"""The calibration pass layer by layer: every sequence through one layer, then the next; memory is one layer."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.activations import Activations
from minitron_cli.importance.gather import Gathered
from minitron_cli.models.streaming import StreamedModel
from minitron_cli.runtime.progress import Progress
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.tokens import Split

SAVE_SHARE = 0.05
"""Saving states that are held in memory may take this share of the time; a kill loses what was done since the last."""


class StreamedSweep:
    """Width scores and block importance; the states between two layers are kept, so a killed run goes on there."""

    def __init__(
        self,
        model: StreamedModel,
        gathered: Gathered,
        activations: Activations,
        config: ImportanceConfig,
        split: Split,
        rows: list[int],
        state: Path,
    ) -> None:
        self.model, self.gathered, self.activations = model, gathered, activations
        self.split, self.rows, self.state = split, rows, state
        self.batches = [
            slice(start, min(start + config.batch_size, len(rows))) for start in range(0, len(rows), config.batch_size)
        ]
        self.layers_done = 0
        self._saved_at, self._save_seconds = time.monotonic(), 0.0

    def run(self) -> None:
        """From the embeddings, or from the last saved layer, through the last layer."""
        layers = len(self.model.layers)
        self._restore()
        if self.layers_done == layers:
            return
        self._enter()
        done = self.layers_done * len(self.rows)
        with Progress(
            "importance", layers * len(self.rows), "sequences x layers", start=done, rate_unit="tokens x layers"
        ) as progress:
            for number in range(self.layers_done, layers):
                self._layer(number, progress)
                self.activations.layer_done()
                self.layers_done += 1
                if self.layers_done == layers:
                    self._leave()
                self._save_when_due()

    def _enter(self) -> None:
        """Embed; after a restart only to learn what the layers are called with, once per shape of batch."""
        seen: set[int] = set()
        with torch.inference_mode():
            for rows in self.batches:
                if self.layers_done and rows.stop - rows.start in seen:
                    continue
                seen.add(rows.stop - rows.start)
                ids = torch.from_numpy(self.split.rows(self.rows[rows])).to(self.model.device)
                states = self.model.enter(ids)
                if not self.layers_done:
                    self.activations.write(rows, states)
        if not self.layers_done:
            self.activations.layer_done()

    def _layer(self, number: int, progress: Progress) -> None:
        (block,) = (placed for placed in self.gathered.blocks if placed.layer == number)
        with (
            self.model.loaded(number),
            self.gathered.listening([number]),
            torch.inference_mode(),
        ):
            for rows in self.batches:
                entering = self.activations.read(rows, self.model.device)
                self.gathered.batch = len(entering)
                leaving = self.model.layer(number, entering)
                self.gathered.depth.heard(block, entering, leaving)
                self.activations.write(rows, leaving)
                progress.advance(len(entering), rated=entering.shape[0] * entering.shape[1], note=f"layer {number}")

    def _leave(self) -> None:
        """What comes after the last layer, for the taps there."""
        taps = any(placed.layer is None for placed in self.gathered.taps)
        with self.gathered.listening([None]), torch.inference_mode():
            for rows in self.batches if taps else []:
                self.gathered.batch = rows.stop - rows.start
                self.model.leave(self.activations.read(rows, self.model.device))

    def _save_when_due(self) -> None:
        """Save after every layer where its states are on disk anyway, else when saving is a small share of the time."""
        began = time.monotonic()
        finished = self.layers_done == len(self.model.layers)
        since = began - self._saved_at
        if self.activations.held is not None and not finished:
            if since < self._save_seconds / SAVE_SHARE:
                return
            self.activations.save()
        tensors, counts = self.gathered.state()
        values = {"layers_done": self.layers_done, "counts": counts, "turn": self.activations.turn}
        save_state(self.state, tensors, values)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def _restore(self) -> None:
        saved = load_state(self.state)
        if saved is None:
            return
        tensors, values = saved
        self.gathered.restore(tensors, values["counts"])
        self.layers_done = values["layers_done"]
        if self.layers_done < len(self.model.layers):
            self.activations.restore(values["turn"])
