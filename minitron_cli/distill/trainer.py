"""One student and its optimizer; knows a step, not where batches or teachers come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron_cli.config.distill import DistillConfig
from minitron_cli.distill.fused import Lesson as Lesson
from minitron_cli.distill.fused import head_loss
from minitron_cli.errors import RunError
from minitron_cli.models.head import Head, backbone_output
from minitron_cli.tokens import Split


@dataclass(frozen=True)
class Batch:
    """Some sequences: `ids` (batch, seq); `targets` (batch, seq - 1) bool, where the next token counts."""

    ids: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def read(cls, split: Split, rows: Sequence[int], device: torch.device) -> Batch:
        """Load sequences from the data set."""
        ids = torch.from_numpy(split.rows(rows)).to(device)
        targets = torch.from_numpy(split.targets(rows)[:, 1:]).to(device)
        return cls(ids, targets)

    def at_targets(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict a target: (batch, seq, hidden) to (targets, hidden)."""
        return hidden[:, :-1][self.targets]

    @property
    def next_tokens(self) -> torch.Tensor:
        """The target ids, (targets,)."""
        return self.ids[:, 1:][self.targets]


class Teacher:
    """A frozen model that passes each batch once, for any number of students."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)

    def lesson(self, batch: Batch) -> Lesson:
        """Run the backbone; logits are made from the lesson chunk by chunk, when a loss needs them."""
        with torch.no_grad():
            output = backbone_output(self.model, batch.ids)
            return Lesson(batch.at_targets(output.last_hidden_state), Head(self.model, output))


def learning_rate(config: DistillConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to `min_lr` times the peak; `step` counts from 0."""
    warmup = max(1, round(config.warmup * steps)) if config.warmup else 0
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Trainer:
    """AdamW on fp32 weights; bf16 compute by autocast where asked for."""

    def __init__(self, model: Any, config: DistillConfig, steps: int, dtype: torch.dtype) -> None:
        self.model, self.config, self.steps = model.train(), config, steps
        self.objective = config.objective
        self.device = next(model.parameters()).device
        self.autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        # Decay shrinks matrices; norm weights and biases have a natural scale of their own.
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, p in named if p.ndim >= 2] + [name for name, p in named if p.ndim < 2]
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=self.device.type in ("cpu", "cuda")
        )

    def update(self, batches: Sequence[Batch], lessons: Sequence[Lesson], step: int) -> float:
        """One optimizer step over micro-batches.

        Args:
            lessons: the teacher's answer to each micro-batch; empty where the loss needs no teacher.

        Returns the mean loss over target tokens, in nats.

        Raises:
            RunError: the loss or the gradient is not finite; the weights are as before the step.
        """
        count = sum(int(batch.targets.sum()) for batch in batches)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in enumerate(batches):
            with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                output = backbone_output(self.model, batch.ids)
                hidden = batch.at_targets(output.last_hidden_state)
                loss = head_loss(
                    hidden,
                    Head(self.model, output),
                    self.objective,
                    teacher=lessons[number] if lessons else None,
                    next_tokens=batch.next_tokens,
                    temperature=self.config.temperature,
                    scale=1 / count,
                )
                hidden.backward(loss.gradient)  # type: ignore[no-untyped-call]
                total += loss.total
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not (math.isfinite(total) and bool(torch.isfinite(norm))):
            raise RunError(
                f"The loss is not finite at step {step + 1}; the last checkpoint is kept. "
                "Try a lower --lr or --dtype float32, or look at the data of this batch."
            )
        self.optimizer.step()
        return total / count

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state, by parameter name."""
        result = {}
        parameters = dict(self.model.named_parameters())
        for name in self.names:
            result[f"weight.{name}"] = parameters[name]
            for key, value in self.optimizer.state.get(parameters[name], {}).items():
                result[f"{key}.{name}"] = value
        return result

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in self.names:
                parameters[name].copy_(tensors[f"weight.{name}"])
                state = {
                    key: tensors[f"{key}.{name}"].to(
                        "cpu" if key == "step" and self.device.type == "cpu" else self.device
                    )
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if state:
                    self.optimizer.state[parameters[name]] = state
