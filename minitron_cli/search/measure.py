"""Measure candidates: cut in memory from one checkpoint, then trained side by side under one teacher forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.search import SearchConfig
from minitron_cli.distill.trainer import Batch, Teacher, Trainer
from minitron_cli.evaluate.perplexity import evaluate_split
from minitron_cli.models.load import load_model, model_from_tensors
from minitron_cli.prune.execute import cut_tensors
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.progress import Progress
from minitron_cli.runtime.state import load_state, save_state
from minitron_cli.tokens import TokenDataset, batch_rows, read_rows

STATE = "state.safetensors"


def cut_in_memory(checkpoint: Checkpoint, plan: PrunePlan, device: torch.device, dtype: torch.dtype) -> Any:
    """The pruned model without writing it."""
    tensors = {planned.name: read() for planned, read in cut_tensors(checkpoint, plan)}
    return model_from_tensors(planned_config(checkpoint.shape, plan), tensors, device=device, dtype=dtype)


class Funnel:
    """Zero-shot losses of all candidates, then a short distillation of the best few; saved as it goes."""

    def __init__(
        self,
        config: SearchConfig,
        checkpoint: Checkpoint,
        dataset: TokenDataset,
        plans: dict[str, PrunePlan],
        partial: Path,
    ) -> None:
        self.config, self.checkpoint, self.plans, self.path = config, checkpoint, plans, partial / STATE
        self.train, self.validation = dataset.split("train"), dataset.split("validation")
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.zero_shot: dict[str, float] = {}
        self.retrained: dict[str, float] = {}

    def run(self) -> None:
        """All measurements, continuing from the saved state."""
        tensors, values = load_state(self.path) or ({}, {"zero_shot": {}, "step": 0})
        self.zero_shot = values["zero_shot"]
        self._measure_zero_shot()
        if self.config.finalists:
            self._retrain(tensors, values["step"])

    def _loss(self, model: Any) -> float:
        count, size = self.config.eval_sequences, self.config.batch_size
        found = evaluate_split(model, self.validation, batch_size=size, max_sequences=count)
        return float(found.loss)

    def _measure_zero_shot(self) -> None:
        with Progress("zero-shot", len(self.plans), "candidates", start=len(self.zero_shot)) as progress:
            for name, plan in self.plans.items():
                if name not in self.zero_shot:
                    model = cut_in_memory(self.checkpoint, plan, self.device, self.dtype)
                    self.zero_shot[name] = self._loss(model)
                    self._save({}, 0)
                    progress.advance(note=f"{name} loss {self.zero_shot[name]:.3f}")

    def _retrain(self, tensors: dict[str, torch.Tensor], first: int) -> None:
        """Train the finalists step by step together: each batch passes the teacher once for all of them."""
        config = self.config
        finalists = sorted(self.zero_shot, key=lambda name: (self.zero_shot[name], name))[: config.finalists]
        settings = self._training()
        trainers = {}
        for name in finalists:
            model = cut_in_memory(self.checkpoint, self.plans[name], self.device, torch.float32)
            trainers[name] = Trainer(model, settings, config.steps, self.dtype)
            if first:
                prefix = f"{name}/"
                trainers[name].restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        teacher = Teacher(load_model(self.checkpoint.path, device=self.device, dtype=self.dtype))
        with Progress("short distillation", config.steps, "steps", start=first, rate_unit="tokens") as progress:
            for step in range(first, config.steps):
                rows = batch_rows(config.seed, step, config.batch_size, len(self.train))
                batch = Batch.read(read_rows(self.train, rows), self.device)
                lessons = [teacher.lesson(batch)]
                losses = [trainer.update([batch], lessons, step).loss for trainer in trainers.values()]
                if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                    self._save(trainers, step + 1)
                progress.advance(rated=batch.ids.numel() * len(trainers), note=f"best loss {min(losses):.3f}")
        self.retrained = {name: self._loss(trainer.model.eval()) for name, trainer in trainers.items()}

    def _training(self) -> DistillConfig:
        config = self.config
        assert config.data is not None and config.out is not None
        return DistillConfig(
            student=config.checkpoint, teacher=config.checkpoint, data=config.data, out=config.out, steps=config.steps,
            batch_size=config.batch_size, lr=config.lr, warmup=config.warmup, min_lr=config.min_lr, seed=config.seed,
        )  # fmt: skip

    def _save(self, trainers: dict[str, Trainer], step: int) -> None:
        tensors = {
            f"{name}/{key}": tensor for name, trainer in trainers.items() for key, tensor in trainer.tensors().items()
        }
        save_state(self.path, tensors, {"zero_shot": self.zero_shot, "step": step})
