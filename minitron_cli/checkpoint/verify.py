"""Does a checkpoint load, and is it whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.errors import CheckpointError


def check_structure(path: Path, *, expected_params: int | None = None) -> int:
    """Compare the files with the stock class on the meta device: same tensors, same shapes; no weights are read.

    Returns the parameter count of the stock class.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or the count differs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint(path)
    _ = checkpoint.declared
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(path), local_files_only=True))
    params: int = sum(parameter.numel() for parameter in model.parameters())
    counted = checkpoint.shape.params
    stored = sum(
        torch.Size(checkpoint.entries[name].shape).numel()
        for name, (tensor, _) in checkpoint.declared.items()
        if tensor.role != "buffer"
    )
    if not params == counted == stored or expected_params not in (None, params):
        raise CheckpointError(
            f"{path}: the stock class has {params:,} parameters, config.json gives {counted:,}, the files {stored:,}"
            + (f", the plan said {expected_params:,}" if expected_params is not None else "")
            + "; please report this as a bug."
        )
    return params


def verify(path: Path) -> dict[str, Any]:
    """Open with stock transformers, run one forward pass, check tokenizer and special tokens.

    Returns a dictionary of findings: `params`, `loads`, `finite`, `warnings`.

    Raises:
        CheckpointError: it does not load or its outputs are not finite.
    """
    from minitron_cli.models.load import load_model

    params = check_structure(path)
    model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(8).remainder(model.config.vocab_size)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(f"{path}: the model's outputs are not finite; the weights are damaged.")
    return {"path": str(path), "params": params, "loads": True, "finite": True, "warnings": _warnings(path, model)}


def _warnings(path: Path, model: Any) -> list[str]:
    """Things that load but will trouble serving."""
    from minitron_cli.errors import MinitronError
    from minitron_cli.models.tokenizer import load_tokenizer

    notes = []
    try:
        tokenizer = load_tokenizer(str(path))
    except MinitronError:
        return ["no tokenizer beside the weights"]
    if len(tokenizer) > model.config.vocab_size:
        notes.append(f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config, name, None)
        if isinstance(value, int) and value >= model.config.vocab_size:
            notes.append(f"{name} {value} is outside the vocabulary")
    ffn = Checkpoint(path).shape.sizes.get("ffn", 0)
    if ffn % 64:
        notes.append(f"ffn {ffn} is not a multiple of 64; some kernels will be slow")
    return notes
