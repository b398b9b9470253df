"""The importance stage."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.numpy import save_file

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import FamilyError, RunError
from minitron_cli.importance.collect import Calibration
from minitron_cli.importance.layout import SCORES, scored_axes
from minitron_cli.importance.weights import weight_norm_scores
from minitron_cli.manifest import StageOutput, fingerprint, require_disk
from minitron_cli.models.load import load_model
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.memory import peak_rss_bytes, require_memory
from minitron_cli.runtime.progress import say
from minitron_cli.tokens import TokenDataset


@dataclass(frozen=True)
class ImportanceResult:
    """What was scored; keys of `--json`."""

    out: str
    samples: int
    tokens: int
    axes: list[str]
    layers: dict[str, list[float]]
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_importance(config: ImportanceConfig) -> ImportanceResult:
    """Score a checkpoint on calibration data; forward passes only.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: scores are not finite.
    """
    began = time.monotonic()
    checkpoint = Checkpoint(resolve(config.checkpoint))
    _ = checkpoint.declared
    if checkpoint.shape.family.draft:
        raise FamilyError(f"{checkpoint.shape.family.name} can be inspected but not scored or pruned yet.")
    dataset = TokenDataset(config.data)
    split = dataset.split("train")
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = {"checkpoint": fingerprint(checkpoint.path), "data": fingerprint(config.data)}
    output = StageOutput(config.out, "importance", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return ImportanceResult(**output.result)
    _require_memory(checkpoint, config, dataset.seq_len, device, dtype.itemsize)
    require_disk(config.out, 64 << 20, "The scores")
    with output:
        model = load_model(checkpoint.path, device=device, dtype=dtype)
        calibration = Calibration(model, checkpoint.shape, config, split, output.partial)
        calibration.restore()
        calibration.sweep()
        calibration.layer_losses()
        scores = calibration.scores()
        # Axes that no activation shows (rotary pairs, query and key channels) are ranked by weights.
        unheard = [axis.name for axis in scored_axes(checkpoint.shape) if axis.name not in scores]
        scores |= weight_norm_scores(checkpoint, only=unheard)
        for name, values in scores.items():
            if not (values == values).all():
                raise RunError(
                    f"Scores of {name} are not numbers; activations overflow in {dtype}, try --dtype float32."
                )
        save_file(scores, output.partial / SCORES)
        result = ImportanceResult(
            out=str(config.out),
            samples=config.samples,
            tokens=config.samples * dataset.seq_len,
            axes=sorted(name for name in scores if not name.startswith("layers.")),
            layers={name: scores[name].tolist() for name in sorted(scores) if name.startswith("layers.")},
            seconds=round(time.monotonic() - began, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )
        output.commit(result.to_json())
    return result


def _require_memory(checkpoint: Checkpoint, config: ImportanceConfig, seq_len: int, device: Any, itemsize: int) -> None:
    shape = checkpoint.shape
    tokens = config.batch_size * seq_len
    widest = max(shape["hidden"] * 6, shape.sizes.get("ffn", 0) * 4)
    parts = {"weights": shape.params * itemsize, "activations": tokens * widest * 4}
    require_memory(parts, device, "use a smaller --batch-size, or a device with more memory")
