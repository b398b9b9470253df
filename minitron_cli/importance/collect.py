"""The calibration pass: all statistics in one sweep of forward passes, then the loss without each layer; resumable."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.importance.depth import DepthScores
from minitron_cli.importance.layout import Array
from minitron_cli.importance.statistics import SampleStatistic
from minitron_cli.importance.width import KINDS, WidthScores
from minitron_cli.models.taps import PlacedTap, listening, place_taps, skipped_layer
from minitron_cli.runtime.progress import Progress
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.shape import Shape
from minitron_cli.tokens import Split, batch_rows

STATE = "state.safetensors"


class Calibration:
    """Statistics over the calibration sequences, saved every few batches so that a killed run continues exactly."""

    def __init__(self, model: Any, shape: Shape, config: ImportanceConfig, split: Split, directory: Path) -> None:
        self.model, self.shape, self.config, self.split, self.directory = model, shape, config, split, directory
        self.device = next(model.parameters()).device
        self.width_taps = list(place_taps(model, shape, KINDS))
        self.blocks = list(place_taps(model, shape, ("block",)))
        self.width = WidthScores(shape, self.width_taps, config.batch_agg, config.seq_agg)
        self.depth = DepthScores(shape["layers"])
        self.batches_done = 0
        self.losses: list[float] = []
        self.rows = batch_rows(config.seed, 0, config.samples, len(split))

    # The state is every accumulator in fp64 and two counters: exact, so that a resumed run ends in the same bytes.

    def _statistics(self) -> list[SampleStatistic]:
        return [*self.width.statistics.values(), *self.depth.statistic]

    def save(self) -> None:
        """Replace the state on disk by the present one."""
        tensors: dict[str, torch.Tensor] = {}
        for number, statistic in enumerate(self._statistics()):
            tensors |= {f"{number}.first": statistic.first, f"{number}.second": statistic.second}
        counts = [statistic.count for statistic in self._statistics()]
        values = {"batches_done": self.batches_done, "counts": counts, "losses": self.losses}
        save_state(self.directory / STATE, tensors, values)

    def restore(self) -> None:
        """Continue from the last saved state, if there is one."""
        saved = load_state(self.directory / STATE)
        if saved is None:
            return
        tensors, values = saved
        for number, statistic in enumerate(self._statistics()):
            statistic.first, statistic.second = tensors[f"{number}.first"], tensors[f"{number}.second"]
            statistic.count = values["counts"][number]
        self.batches_done, self.losses = values["batches_done"], values["losses"]

    def sweep(self) -> None:
        """Forward every calibration sequence once, gathering width scores and block importance."""
        size = self.config.batch_size
        starts = range(0, len(self.rows), size)
        done = min(self.batches_done * size, len(self.rows))
        handles = self.depth.attach(self.blocks)
        try:
            with (
                Progress("importance", len(self.rows), "sequences", start=done, rate_unit="tokens") as progress,
                listening(self.width_taps, self.width.heard),
                torch.inference_mode(),
            ):
                for start in starts[self.batches_done :]:
                    rows = self.rows[start : start + size]
                    ids = torch.from_numpy(self.split.rows(rows)).to(self.device)
                    # The head is not needed for width scores: the base model saves its flops.
                    self.model.base_model(ids, use_cache=False)
                    self.batches_done += 1
                    progress.advance(len(rows), rated=ids.numel())
                    if self.batches_done % self.config.save_every == 0:
                        self.save()
        finally:
            for handle in handles:
                handle.remove()
        self.save()

    def layer_losses(self) -> None:
        """Validation-style loss on some calibration sequences: whole model first, then without each layer."""
        count = min(self.config.loss_samples, len(self.rows))
        if not count:
            return
        runs: list[PlacedTap | None] = [None, *self.blocks]
        view = Split(self.split.name, *_rows_of(self.split, self.rows[:count]), self.split.bytes_per_token)
        with Progress("layer loss", len(runs), "passes", start=len(self.losses)) as progress:
            for placed in runs[len(self.losses) :]:
                self.losses.append(self._loss(view, placed))
                self.save()
                progress.advance()

    def _loss(self, view: Split, placed: PlacedTap | None) -> float:
        """Loss in nats per token, with one layer skipped or (None) the whole model."""
        with nullcontext() if placed is None else skipped_layer(placed):
            return evaluate_split(self.model, view, batch_size=self.config.batch_size).loss

    def scores(self) -> dict[str, Array]:
        """All scores gathered: width axes, `layers.bi`, and `layers.loss` (increase in nats per token)."""
        result = {**self.width.scores(), "layers.bi": self.depth.scores().numpy()}
        if self.losses:
            result["layers.loss"] = np.asarray(self.losses[1:]) - self.losses[0]
        return result


def _rows_of(split: Split, rows: list[int]) -> tuple[Any, Any]:
    return split.tokens[rows], None if split.mask is None else split.mask[rows]
