"""The calibration pass with the whole model in memory: every statistic in one sweep of forward passes; resumable."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.gather import Gathered
from minitron_cli.models.streaming import ResidentModel
from minitron_cli.runtime.progress import Progress
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.tokens import Split


class ResidentSweep:
    """Width scores and block importance, saved every few batches so that a killed run continues exactly."""

    def __init__(
        self,
        model: ResidentModel,
        gathered: Gathered,
        config: ImportanceConfig,
        split: Split,
        rows: list[int],
        state: Path,
    ) -> None:
        self.model, self.gathered, self.config, self.split, self.rows = model, gathered, config, split, rows
        self.state = state
        self.device = next(model.model.parameters()).device
        self.batches_done = 0

    def run(self) -> None:
        """Forward every calibration sequence once."""
        self._restore()
        size = self.config.batch_size
        starts = range(0, len(self.rows), size)[self.batches_done :]
        done = len(self.rows) - len(self.rows[self.batches_done * size :])
        handles = self.gathered.depth.attach(self.gathered.blocks)
        try:
            with (
                Progress("importance", len(self.rows), "sequences", start=done, rate_unit="tokens") as progress,
                self.gathered.listening(),
                torch.inference_mode(),
            ):
                for start in starts:
                    rows = self.rows[start : start + size]
                    ids = torch.from_numpy(self.split.rows(rows)).to(self.device)
                    self.gathered.batch = len(rows)
                    # The head is not needed for width scores: the base model saves its flops.
                    self.model.model.base_model(ids, use_cache=False)
                    self.batches_done += 1
                    progress.advance(len(rows), rated=ids.numel())
                    if self.batches_done % self.config.save_every == 0:
                        self._save()
        finally:
            for handle in handles:
                handle.remove()
        self._save()

    # The state is every accumulator in fp64 and two counters: exact, so that a resumed run ends in the same bytes.

    def _save(self) -> None:
        tensors, counts = self.gathered.state()
        save_state(self.state, tensors, {"batches_done": self.batches_done, "counts": counts})

    def _restore(self) -> None:
        saved = load_state(self.state)
        if saved is not None:
            tensors, values = saved
            self.gathered.restore(tensors, values["counts"])
            self.batches_done = values["batches_done"]
