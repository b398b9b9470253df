"""Tiny models for tests: random weights, shapes chosen so that mixed-up axes cannot cancel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tiny import TINY
from transformers import AutoConfig, AutoModelForCausalLM

STEADY = 1
"""Channel of the residual stream that is the same positive number for every token, in models with routed experts: a
router row that weighs it can rule an expert out."""

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
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
        if any(".experts." in name for name, _ in model.named_parameters()):
            steady_stream(model)
    model.save_pretrained(path)
    return path


def steady_stream(model: torch.nn.Module) -> None:
    """Embeddings give the channel `STEADY` one value, nothing adds to it, and routers look at the others."""
    embeddings = model.get_input_embeddings().weight
    embeddings[:, STEADY] = 1.0
    for name, parameter in model.named_parameters():
        if re.search(r"norm\.bias$", name):
            # A LayerNorm takes the mean out, which may leave any sign: what it puts out is its bias alone.
            model.get_submodule(name.removesuffix(".bias")).weight[STEADY] = 0
            parameter[STEADY] = 1
        if re.search(r"\.(gate|router)\.weight$", name):
            parameter[:, STEADY] = 0
        if re.search(r"\.(o_proj|down_proj|out_proj|fc2_latent_proj)([._](weight|bias))?$", name):
            lengths = list(parameter.shape)
            if embeddings.shape[1] in lengths:
                parameter.select(lengths.index(embeddings.shape[1]), STEADY).zero_()


def logits(path: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits of the stock class, (batch, seq, vocab)."""
    # The product that runs experts by default knows no fp64.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(ids).logits
