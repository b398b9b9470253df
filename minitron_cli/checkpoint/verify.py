"""Does a checkpoint load, and is it whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.blocks import Whole, Workspace, all_finite
from minitron_cli.checkpoint.companions import check_companions
from minitron_cli.checkpoint.multimodal import check_wrapped, is_wrapped, open_checkpoint
from minitron_cli.checkpoint.reader import Checkpoint, read_header
from minitron_cli.checkpoint.serving import serving_warnings
from minitron_cli.checkpoint.writer import not_finite
from minitron_cli.errors import CheckpointError


def check_structure(path: Path, *, expected_params: int | None = None) -> int:
    """Compare the files with the stock class on the meta device: same tensors, same shapes; no weights are read.

    Returns the parameter count of the stock class.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or the count differs.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_wrapped(path):
        return check_wrapped(path, expected_params=expected_params)
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


def check_contents(path: Path, *, source: Path | None = None) -> None:
    """Read back what was written: every value of every tensor is finite, and the companions of `source` came along.

    Raises:
        CheckpointError: it names the first tensor that holds NaN or infinity, or the file that is missing.
    """
    for file in sorted(path.glob("*.safetensors")):
        check_finite(file)
    if source is not None:
        check_companions(source, path)


def check_finite(file: Path) -> None:
    """Look at every value of one safetensors file, a bounded number at a time.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    workspace = Workspace()
    for entry in read_header(file):
        for _, produce in Whole(entry).blocks():
            if not all_finite(produce(workspace), entry.dtype):
                raise not_finite(entry.name, file, entry.dtype)


def verify(path: Path) -> dict[str, Any]:
    """Is it whole, does the stock class load and run it, and what will trouble serving?

    Every value is read once, streamed. The forward pass needs the whole model in memory; where that does not fit it is
    left out, and `ran` says so.

    Returns a dictionary of findings: `params`, `loads`, `finite`, `ran`, `warnings`.

    Raises:
        CheckpointError: it is not whole, does not load, or its values or outputs are not finite.
    """
    params = check_structure(path)
    check_contents(path)
    checkpoint = open_checkpoint(path)
    ran = _run_once(path, checkpoint)
    warnings = serving_warnings(checkpoint.shape, path)
    return {"path": str(path), "params": params, "loads": True, "finite": True, "ran": ran, "warnings": warnings}


def _run_once(path: Path, checkpoint: Checkpoint) -> bool:
    import torch

    from minitron_cli.models.load import load_model
    from minitron_cli.runtime.memory import available_bytes

    device = torch.device("cpu")
    # The weights in fp32, and once more while they are converted.
    if checkpoint.shape.params * 4 + checkpoint.nbytes > available_bytes(device) // 2:
        return False
    model = load_model(path, device=device, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(8).remainder(checkpoint.shape["vocab"])[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(f"{path}: the model's outputs are not finite; the weights are damaged.")
    return True
