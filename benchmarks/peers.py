"""Other packages' distillation losses, each by its own code on the same models; whatever is not installed says why.

The trainers' `compute_loss` runs without their loop around it: batches, backward pass, clipping and optimizer are the
same for all, so that rows differ by the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitron_cli.models.head import backbone_output

Loss = Callable[[Any, Any, Tensor], Tensor]
"""Of (student, teacher, ids of (batch, seq)): forward KL at temperature 1, with a graph to the student."""


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _trainer(kind: type, **attributes: Any) -> Any:
    """A trainer that only has what its `compute_loss` reads."""
    trainer = kind.__new__(kind)
    vars(trainer).update(attributes)
    return trainer


def trl() -> Loss:
    """TRL's GKD at `lmbda=0, beta=0`: on the given text, forward KL."""
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
        trainer = _trainer(GKDTrainer, teacher_model=teacher, beta=0.0)
        result: Tensor = trainer.compute_loss(student, _inputs(ids))
        return result

    return loss


def modelopt() -> Loss:
    """ModelOpt's `KDTrainer`, without Liger (its fused kernel needs a GPU)."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    criterion = LogitsDistillationLoss(temperature=1.0, reduction="none")

    def loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
        trainer = _trainer(
            KDTrainer, _teacher_model=teacher, _kd_criterion=criterion, _teacher_prepared=True, use_liger_kernel=False,
            is_deepspeed_enabled=False,
        )  # fmt: skip
        result: Tensor = trainer.compute_loss(student, _inputs(ids))
        return result

    return loss


def liger() -> Loss:
    """Liger's chunked JSD loss at `beta=0`, not compiled, 128 tokens a chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=128
    )

    def loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = backbone_output(teacher, ids).last_hidden_state[:, :-1].flatten(0, 1)
        hidden = backbone_output(student, ids).last_hidden_state[:, :-1].flatten(0, 1)
        weights = student.lm_head.weight, teacher.lm_head.weight
        result: Tensor = fused(hidden, weights[0], target, weights[1], ids[:, 1:].flatten())
        return result

    return loss


def optipfair() -> Loss:
    """optipfair's compound loss, its soft labels alone, unskewed."""
    from optipfair.distillation.loss import compute_distillation_loss

    def loss(student: Any, teacher: Any, ids: Tensor) -> Tensor:
        made = student(input_ids=ids).logits
        with torch.no_grad():
            target = teacher(input_ids=ids).logits
        total: Tensor = compute_distillation_loss(
            made, target, None, None, ids, alpha=0.0, beta=1.0, temperature=1.0, skew_alpha=0.0
        )[0]
        return total

    return loss


PEERS: dict[str, Callable[[], Loss]] = {
    "TRL, GKD": trl,
    "ModelOpt, KDTrainer": modelopt,
    "Liger, chunked JSD": liger,
    "optipfair": optipfair,
}
