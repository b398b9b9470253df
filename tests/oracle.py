"""The oracle: the original model with removed structure masked on disk, run by the stock class.

A mask alone is not the same function in three places, which are compensated: an RMSNorm over a cut dimension (its
weight on disk and its epsilon), a LayerNorm over one (its statistics are taken over the kept channels), and Gemma's
embedding scale sqrt(hidden).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import STEADY
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.companions import copy_companions
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.surgery import positions
from minitron_cli.errors import ShapeError
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Tensor
from minitron_cli.models.taps import place_taps, skipped_layer
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.sizes import complete_target, members
from minitron_cli.shape import Shape, expert_of

NORMS_THE_STREAM = ("opt_post_norm",)
AXES = (
    "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "experts", "expert_ffn", "shared_ffn", "q_rank",
    "kv_rank", "v_head_dim", "qk_nope", "qk_rope",
)  # fmt: skip
"""Axes of which the matrix says that the stock class forbids to cut them, where it does."""

RULED_OUT = -1e4
"""What the router gives a removed expert: nothing is left of it behind a softmax or a sigmoid."""


def valid(shape: Shape, target: dict[str, int]) -> bool:
    """Whether the family's rules allow these sizes."""
    try:
        complete_target(shape, target)
    except ShapeError:
        return False
    return True


def cases(shape: Shape) -> dict[str, dict[str, int]]:
    """Targets that cut every prunable axis alone, head_dim and experts to two sizes, and all at once."""
    found: dict[str, dict[str, int]] = {}
    everything: dict[str, int] = {}
    prunable = [axis.name for axis in shape.family.axes if axis.prunable and axis.name not in shape.absent]
    for axis in prunable:
        fits = [size for size in range(3 * shape[axis] // 4, 0, -1) if valid(shape, {axis: size})]
        if not fits:
            assert axis in shape.family.coupled, f"{axis} cannot be cut alone, and follows no other"
            continue
        found[axis] = {axis: fits[0]}
        if axis == "head_dim":
            found["head_dim, smallest"] = {axis: next(size for size in fits[::-1] if size > 2)}
        if axis == "experts":
            found["experts, fewest"] = {axis: fits[-1]}
    inner = [over for over, _ in members(shape.family).values()]
    for axis in sorted(prunable, key=lambda axis: (axis in inner, axis in ("head_dim", "hidden"))):
        # Fewer heads than the kept KV heads (or groups) bring along.
        largest = shape[axis] // 2 if axis in inner else 3 * shape[axis] // 4
        for size in range(largest, 0, -1) if axis in found else ():
            if valid(shape, {**everything, axis: size}):
                everything[axis] = size
                break
    return {**found, "everything": everything}


@dataclass
class Masked:
    """Where the masked original lies, and what must be adjusted once it is loaded."""

    path: Path
    embed_scale: float | None = None
    eps: dict[str, float] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    offset: float = 0.0
    removed: list[int] = field(default_factory=list)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the stock class in fp64."""
        checkpoint = Checkpoint(self.path)
        model = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        if self.embed_scale is not None:
            model.get_input_embeddings().embed_scale.fill_(self.embed_scale)
        for name, module in model.named_modules():
            if "Norm" not in type(module).__name__ or any(module.children()):
                continue
            name = checkpoint.shape.family.on_disk(name)
            if name in self.eps:
                attribute = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
                setattr(module, attribute, getattr(module, attribute) * self.eps[name])
            kept = self.kept.get(name, self.kept.get("") if not list(module.parameters()) else None)
            if kept is not None:
                module.forward = partial_layer_norm(module, kept, self.offset)
        with torch.inference_mode(), ExitStack() as stack:
            for block in place_taps(model, checkpoint.shape, ("block",)):
                if block.layer in self.removed:
                    stack.enter_context(skipped_layer(block))
            return model(ids, use_cache=False).logits


def partial_layer_norm(module: Any, kept: torch.Tensor, offset: float) -> Any:
    """LayerNorm with statistics over the kept channels; zero elsewhere."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        some = x[..., kept]
        some = some - some.mean(-1, keepdim=True)
        some = some * torch.rsqrt(some.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            some = some * (weight[..., kept] + offset)
        if bias is not None:
            some = some + bias[..., kept]
        return torch.zeros_like(x).index_copy(-1, kept, some)

    return forward


def masked_original(source: Path, plan: PrunePlan, out: Path, *, compensate: bool = True, rotate: int = 0) -> Masked:
    """The original with every removed unit's weights zeroed; `rotate` masks other units instead (a control)."""
    checkpoint = Checkpoint(source)
    family, sizes = checkpoint.shape.family, checkpoint.shape.sizes
    out.mkdir()
    masked = Masked(out, offset=family.norm.offset)
    tensors = load_file(source / "model.safetensors")
    for name, (tensor, layer) in checkpoint.declared.items():
        norm = (tensor.norm or family.norm) if tensor.role in ("norm", "query_norm") else None
        offset = norm.offset if norm else 0.0
        value = tensors[name].double() + offset
        if layer is not None and layer not in plan.layers:
            # A removed layer adds nothing to the residual stream; one that norms the stream itself must be skipped.
            if family.name in NORMS_THE_STREAM and layer not in masked.removed:
                masked.removed.append(layer)
            tensors[name] = torch.zeros_like(value).float() if norm is None else tensors[name]
            continue
        value = value * mask_of(checkpoint, name, tensor, plan.kept(layer), rotate)
        if norm and compensate:
            chosen = kept_positions(checkpoint, tensor, plan.kept(layer), rotate)[-1]
            module, ratio = name.removesuffix(".weight"), len(chosen) / value.shape[-1]
            if norm.divided_by in plan.sizes:
                masked.eps[module] = plan.sizes[norm.divided_by] / sizes[norm.divided_by]
            if norm.per:  # each group of channels has statistics of its own
                ratio /= plan.sizes[norm.per] / sizes[norm.per]
            if norm.kind == "layer" and len(chosen) < value.shape[-1]:
                masked.kept[module] = chosen
            elif len(chosen) < value.shape[-1]:
                masked.eps[module] = masked.eps.get(module, 1.0) * ratio
                value = value * math.sqrt(ratio)
        if tensor.role in ("router", "buffer") and tensor.dims[0] == "experts":
            removed = ~kept_experts(checkpoint, plan.kept(layer), rotate)
            value[(removed, STEADY) if value.ndim == 2 else removed] = RULED_OUT
        tensors[name] = (value - offset).float()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    copy_companions(source, out)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    if plan.sizes["hidden"] < sizes["hidden"] and compensate:
        if family.norm.kind == "layer":  # norms without weights
            masked.kept[""] = kept_positions(checkpoint, Tensor(("hidden",)), plan.kept(None), rotate)[0]
        if family.embed_scale:
            masked.embed_scale = math.sqrt(plan.sizes[family.embed_scale])
    return masked


def kept_experts(checkpoint: Checkpoint, kept: Any, rotate: int) -> torch.Tensor:
    """Which experts stay, (experts,)."""
    count = checkpoint.shape["experts"]
    stays = torch.zeros(count, dtype=torch.bool)
    stays[(torch.as_tensor(kept.get("experts", range(count))) + rotate) % count] = True
    return stays


def mask_of(checkpoint: Checkpoint, name: str, tensor: Tensor, kept: Any, rotate: int) -> torch.Tensor:
    """1 where a tensor's values stay."""
    family, expert = checkpoint.shape.family, expert_of(name)
    part = family.taken_apart(tensor)
    if part is not None:
        stays = kept_experts(checkpoint, kept, rotate)
        return torch.stack([
            mask_of(checkpoint, f".experts.{number}.", part, kept, rotate) * stays[number]
            for number in range(len(stays))
        ])  # fmt: skip
    mask = torch.ones(())
    for size, chosen in zip(
        family.tensor_shape(tensor, checkpoint.shape.sizes),
        kept_positions(checkpoint, tensor, kept, rotate, expert),
        strict=True,
    ):
        along = torch.zeros(size)
        along[chosen] = 1.0
        mask = mask[..., None] * along
    return mask if expert is None else mask * kept_experts(checkpoint, kept, rotate)[expert]


def kept_positions(
    checkpoint: Checkpoint, tensor: Tensor, kept: Any, rotate: int, expert: int | None = None
) -> list[torch.Tensor]:
    """Positions that stay along each dimension; a control shifts those of cut dimensions."""
    family, sizes = checkpoint.shape.family, checkpoint.shape.sizes
    within = {axis.name: axis.within for axis in family.axes if axis.within}
    found = []
    for text, size in zip(tensor.dims, family.tensor_shape(tensor, sizes), strict=True):
        assert axes(parse(text)) <= sizes.keys()
        outer = {} if expert is None else {"experts": expert}
        chosen = (positions(parse(text), sizes, kept, within, outer) + rotate) % size
        found.append(torch.from_numpy(np.ascontiguousarray(chosen)))
    return found
