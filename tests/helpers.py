"""Tiny models for tests: random weights, shapes chosen so that mixed-up axes cannot cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import TINY
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def make_model(
    path: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny random model of a family; every parameter is random, biases and norms too."""
    values = {**TINY[family], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and ("norm" in name or "ln_" in name):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(path)
    return path


def logits(path: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of the stock class, (batch, seq, vocab)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        return model(ids).logits
