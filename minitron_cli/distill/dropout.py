"""Training without randomness inside the model: the teacher's answer is a target for the whole student."""

from __future__ import annotations

from typing import Any

import torch

RANDOM = ("dropout", "pdrop", "layerdrop", "drop_path", "jitter")
"""Parts of the names stock classes give their rates of random changes, in configs and in modules."""


def without_dropout(model: Any) -> Any:
    """Set every rate of dropout, dropped layers and router noise to 0, in the config and in every module.

    Routers stay in evaluation mode for good: in training some draw their experts, and what they call their jitter may
    be a threshold that evaluation needs too (PhiMoE).
    """
    config = model.config
    for each in (config, config.get_text_config()):
        for name, value in vars(each).items():
            if _is_rate(name, value):
                setattr(each, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if type(module).__name__.endswith("Router"):
            module.eval().train = lambda mode=True, router=module: router
            continue
        for name, value in vars(module).items():
            if _is_rate(name, value):
                setattr(module, name, 0.0)
    return model


def _is_rate(name: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and any(part in name for part in RANDOM)
