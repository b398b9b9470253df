"""The importance stage."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.errors import FamilyError, RunError
from minitron_cli.importance.activations import Activations
from minitron_cli.importance.collect import ResidentSweep
from minitron_cli.importance.experts import describe_tokens
from minitron_cli.importance.gather import Gathered
from minitron_cli.importance.layout import SCORES, STATISTICS, Array, scored_axes
from minitron_cli.importance.memory import PassMemory
from minitron_cli.importance.removal import require_scorable, score_removals
from minitron_cli.importance.residual import collected
from minitron_cli.importance.stream import StreamedSweep
from minitron_cli.importance.weights import weight_norm_scores
from minitron_cli.manifest import StageOutput, fingerprint, require_disk
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.models.streaming import ResidentModel, StreamedModel, open_model
from minitron_cli.runtime.device import pick_device, pick_dtype
from minitron_cli.runtime.group import Group, process_group
from minitron_cli.runtime.memory import peak_rss_bytes
from minitron_cli.runtime.progress import byte_size, say
from minitron_cli.tokens import Split, TokenDataset, batch_rows

DEPTH = ("layers", "blocks", "greedy", "full")
"""What the names of depth scores begin with."""


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
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Tokens that each routed expert was sent, by layer."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_importance(config: ImportanceConfig) -> ImportanceResult:
    """Score a checkpoint on calibration data; forward passes only, shared by all processes of a `torchrun`.

    Raises:
        UserError: the input is wrong; nothing was written.
        RunError: scores are not finite.
    """
    with process_group() as group:
        return _run(config, group)


def _run(config: ImportanceConfig, group: Group) -> ImportanceResult:
    began = time.monotonic()
    checkpoint = Checkpoint(resolve(config.checkpoint))
    _ = checkpoint.declared
    if checkpoint.shape.family.draft:
        raise FamilyError(f"{checkpoint.shape.family.name} can be inspected but not scored or pruned yet.")
    collected(config, checkpoint.shape)
    dataset = TokenDataset(config.data)
    split = dataset.split("train")
    require_same_tokenizer(dataset, {"the checkpoint": config.checkpoint})
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    inputs = {"checkpoint": fingerprint(checkpoint.path), "data": fingerprint(config.data)}
    if config.depth_task_dir is not None:
        inputs["tasks"] = fingerprint(config.depth_task_dir)
    with group.main_first():  # a finished OUT.partial is renamed by one of them
        output = StageOutput(config.out, "importance", config, inputs, force=config.force, resumable=True)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return ImportanceResult(**output.result)
    memory = PassMemory.of(checkpoint, config, dataset.seq_len, device, dtype)
    memory.require()
    streamed = config.stream or group.any(not memory.resident_fits())
    require_scorable(config, checkpoint.shape["layers"], streamed=streamed)
    if streamed:
        held, whole = byte_size(memory.frame + memory.layer // 2), byte_size(memory.weights)
        say(f"One layer at a time: {held} of {whole} of weights in memory.")
    # A streamed pass keeps two sets of states on disk, so that it can go on where it was killed.
    require_disk(config.out, (64 << 20) + 2 * memory.states * streamed, "The calibration pass")
    group.wait()  # all have looked at OUT before one of them changes it
    with output if group.main else nullcontext():
        group.wait()
        model = open_model(checkpoint, device, dtype, streamed=streamed)
        gathered = _swept(model, config, split, group, output.partial, memory.place())
        scores = gathered.scores()
        scores |= _removed(model, config, split, group, output.partial)
        # Axes that no activation shows (rotary pairs, query and key channels) are ranked by weights.
        known = scores.keys() | checkpoint.shape.absent
        unheard = [axis.name for axis in scored_axes(checkpoint.shape) if axis.name not in known]
        scores |= weight_norm_scores(checkpoint, only=unheard)
        _require_finite(scores, dtype)
        tokens = gathered.experts.tokens()
        for line in describe_tokens(tokens):
            say(line)
        result = ImportanceResult(
            out=str(config.out),
            samples=config.samples,
            tokens=config.samples * dataset.seq_len,
            axes=sorted(name for name in scores if "." not in name),
            layers={name: scores[name].tolist() for name in sorted(scores) if name.partition(".")[0] in DEPTH},
            seconds=round(time.monotonic() - began, 3),
            peak_rss_bytes=peak_rss_bytes(),
            expert_tokens={str(layer): counts for layer, counts in tokens.items()},
        )
        if group.main:
            save_file(scores, output.partial / SCORES)
            save_file(gathered.residual.tensors(), output.partial / STATISTICS)
            output.commit(result.to_json())
        group.wait()
    return result


def _swept(
    model: ResidentModel | StreamedModel,
    config: ImportanceConfig,
    split: Split,
    group: Group,
    partial: Path,
    place: torch.device | None,
) -> Gathered:
    """The statistics of one pass: this process's share of the sequences, joined with those of all others."""
    rows = group.share(batch_rows(config.seed, 0, config.samples, len(split)))
    gathered = Gathered(model, config)
    mine = f"{group.rank}-of-{group.size}"
    if isinstance(model, StreamedModel):
        size = (len(rows), split.tokens.shape[1], model.shape["hidden"])
        activations = Activations(size, model.dtype, partial / f"state.activations-{mine}", place=place)
        state = partial / f"state.streamed-{mine}.safetensors"
        StreamedSweep(model, gathered, activations, config, split, rows, state).run()
    else:
        ResidentSweep(model, gathered, config, split, rows, partial / f"state.sweep-{mine}.safetensors").run()
    gathered.merge_over(group)
    return gathered


def _removed(
    model: ResidentModel | StreamedModel, config: ImportanceConfig, split: Split, group: Group, partial: Path
) -> dict[str, Array]:
    """Depth scores: what the model loses without some of its layers."""
    rows = batch_rows(config.seed, 0, config.samples, len(split))[: config.loss_samples]
    return score_removals(model, split, group.share(rows), config, partial, group)


def _require_finite(scores: dict[str, Array], dtype: torch.dtype) -> None:
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise RunError(f"Scores of {name} are not finite; activations overflow in {dtype}, try --dtype float32.")
