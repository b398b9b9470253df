"""A model whose fp32 weights AdamW changes: the optimizer step, its rails, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from minitron_cli.config.distill import OptimizerConfig
from minitron_cli.distill.checkpoints import Saved, fill
from minitron_cli.distill.dropout import without_dropout
from minitron_cli.distill.schedule import learning_rate
from minitron_cli.errors import ConfigError, RunError
from minitron_cli.models.split import clip_gradients, device_of, is_split
from minitron_cli.runtime.group import Group


class NotFinite(RunError):
    """The loss or the gradient is NaN or infinite; weights and optimizer are as before the step."""


class Learner:
    """AdamW on fp32 weights; bf16 compute by autocast where asked for.

    With a group of several processes the model may be split (models/shard.py); each process's gradients are those of
    its own part of a step, and all of them take each step together.
    """

    def __init__(
        self,
        model: Any,
        config: OptimizerConfig,
        steps: int,
        dtype: torch.dtype,
        others: Mapping[str, torch.nn.Parameter | None] | None = None,
        group: Group | None = None,
    ) -> None:
        """Make the model ready to train, with parameters beside its own where `others` has some.

        Raises:
            ConfigError: its stock class cannot recompute activations.
        """
        self.model, self.optimizing, self.steps = without_dropout(model).train(), config, steps
        self.group = group or Group()
        self.device = device_of(model)
        self.autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        # Decay shrinks matrices; norm weights and biases have a natural scale of their own.
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = {name: p for name, p in named if p.ndim >= 2}
        free = {name: p for name, p in named if p.ndim < 2}
        beside = {name: p for name, p in (others or {}).items() if p is not None}
        self.parameters = {**decayed, **free, **beside}
        groups = [
            {"params": list(decayed.values()), "weight_decay": config.weight_decay},
            {"params": list(free.values()), "weight_decay": 0.0},
        ]
        if beside:  # not split, so not with those that are
            groups.append({"params": list(beside.values()), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=self.device.type in ("cpu", "cuda")
        )
        if config.checkpoint_activations:
            if not model.supports_gradient_checkpointing:
                raise ConfigError(f"{type(model).__name__} cannot recompute; leave out --checkpoint-activations.")
            # transformers renames it: the old name warns in 5.23, the new one is not in 5.10.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def computing(self) -> torch.autocast:
        """The context of forward passes."""
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def begin(self, step: int) -> None:
        """Forget gradients and set the learning rate of a step, counted from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optimizing, step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self, loss: float, step: int) -> tuple[float, float]:
        """Clip the gradients and change the weights; returns the gradient's norm before clipping, and the rate.

        Raises:
            NotFinite: the loss or the gradient is not finite.
        """
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(f"The loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {step + 1}.")
        self.optimizer.step()
        return norm, float(self.optimizer.param_groups[0]["lr"])

    def _clip(self) -> float:
        """Make the gradient no longer than allowed; returns its norm before."""
        if self.group.size == 1:
            return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.optimizing.clip))
        # Those of split parameters were summed over all processes on the way.
        whole = [parameter for parameter in self.parameters.values() if not is_split(parameter)]
        graded = self.group.total(torch.tensor([parameter.grad is not None for parameter in whole], dtype=torch.int32))
        for parameter, anywhere in zip(whole, graded.tolist(), strict=True):
            if anywhere:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.group.total(gradient)
        return clip_gradients(self.parameters.values(), self.optimizing.clip, self.group)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state, by parameter name."""
        result = {}
        for name, parameter in self.parameters.items():
            result[f"weight.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                result[f"{key}.{name}"] = value
        return result

    def restore(self, saved: Saved) -> None:
        """Take back what `tensors` gave."""
        for name, parameter in self.parameters.items():
            if f"step.{name}" in saved:
                place = "cpu" if parameter.device.type == "cpu" else self.device
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=place),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        fill(self.tensors(), saved)
