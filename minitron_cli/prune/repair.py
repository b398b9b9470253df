"""Repair: the projections that end attention and MLP are fitted again to put out what the original's did.

Layer by layer, calibration text passes the original and the pruned model side by side. The target is the original's
residual stream behind the projection; the pruned model's own activations, after all repairs before, are the inputs; the
correction of the projection's weight has a closed form. The new weights replace the old ones inside the written file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minitron_cli.checkpoint.dtypes import TORCH_DTYPES
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.writer import write_at
from minitron_cli.errors import FamilyError, RunError
from minitron_cli.families.expression import parse, size
from minitron_cli.families.schema import Tap
from minitron_cli.importance.activations import Activations
from minitron_cli.importance.store import load_basis
from minitron_cli.models.streaming import StreamedModel, weight_bytes
from minitron_cli.models.taps import PlacedTap, find_taps, listening
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.ridge import Moments, correction
from minitron_cli.runtime.device import wide_device
from minitron_cli.runtime.memory import available_bytes, require_memory
from minitron_cli.runtime.progress import Progress
from minitron_cli.shape import Shape
from minitron_cli.tokens import Split

ENDS = ("attention", "mixer", "ffn")
"""Taps on what enters the projections that write into the residual stream, in the order of a layer."""

HELD_OUT = 8
"""One in so many sequences chooses the damping."""


@dataclass(frozen=True)
class Projection:
    """A projection that writes into the residual stream, `factor` times what it puts out, and its tensor's name."""

    tap: Tap
    layer: int
    name: str
    dims: tuple[str, ...]
    factor: float
    first: bool = False
    last: bool = False

    @property
    def module(self) -> str:
        """Its path in the stock model."""
        return self.tap.module.format(layer=self.layer)


def projections(shape: Shape) -> dict[int, list[Projection]]:
    """The projections of every layer, in the order they run.

    Raises:
        FamilyError: the family does not say where they are, or they are not plain linears.
    """
    declared = {name: tensor for name, tensor, _ in shape.family.expected(shape.config)}
    found: dict[int, list[Projection]] = {layer: [] for layer in range(shape["layers"])}
    for kind in ENDS:
        for tap, layer in find_taps(shape, kind):
            name = shape.family.on_disk(tap.module.format(layer=layer)) + ".weight"
            tensor = declared.get(name)
            if (
                layer is None
                or tap.side != "input"
                or tensor is None
                or sorted(tensor.dims) != sorted(("hidden", tap.dims))
            ):
                raise FamilyError(
                    f"{shape.family.name} cannot be repaired, as its {kind} does not end in a plain linear; use "
                    "--repair off."
                )
            factor = shape.family.residual_factor(shape.config, kind)
            found[layer].append(Projection(tap, layer, name, tensor.dims, factor))
    # Routed experts end in no single projection: in their layers the last one that can be fitted is not the end.
    routed = {layer for _, layer in find_taps(shape, "experts")}
    return {
        layer: [
            replace(end, first=number == 1, last=number == len(ends) and layer not in routed)
            for number, end in enumerate(ends, 1)
        ]
        for layer, ends in found.items()
    }


class Repair:
    """One pass over the layers of both models; each holds one layer at a time."""

    def __init__(
        self, original: StreamedModel, pruned: StreamedModel, plan: PrunePlan, split: Split, rows: list[int],
        batch_size: int, directory: Path, place: torch.device | None,
    ) -> None:  # fmt: skip
        """`directory` may hold states between layers; `place` as of `Activations`."""
        self.original, self.pruned, self.plan, self.split, self.rows = original, pruned, plan, split, rows
        self.device = original.device
        held = max(1, len(rows) // HELD_OUT)
        parts = [(0, len(rows) - held), (len(rows) - held, len(rows))]
        self.fitted, self.held_out = (
            [slice(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
            for first, last in parts
        )
        seq = split.tokens.shape[1]
        self.states = {
            model: Activations(
                (len(rows), seq, model.shape["hidden"]), model.dtype, directory / f"state.{name}", place=place
            )
            for name, model in (("original", original), ("pruned", pruned))
        }
        self.ends = projections(original.shape), projections(pruned.shape)
        self._basis: torch.Tensor | None = None
        if plan.rotate:
            basis = load_basis(Path(plan.statistics), original.shape["hidden"], plan.sizes["hidden"])
            self._basis = basis.to(self.device)
        self._bare = not original.shape.family.post_norms
        self._kept = plan.keep.get("hidden")

    def run(self) -> dict[str, float | None]:
        """Repair every projection; its damping by its tensor's name, None where nothing made it better."""
        chosen: dict[str, float | None] = {}
        kept, layers = self.plan.layers, len(self.original.layers)
        self._enter()
        with Progress("repair", layers, "layers") as progress, torch.inference_mode():
            self._pass_over(range(kept[0]), progress)
            for place, number in enumerate(kept):
                ends = list(zip(self.ends[0][number], self.ends[1][place], strict=True))
                with self.pruned.loaded(place):
                    with self.original.loaded(number):
                        for old, new in ends:
                            if not self._meets_stream(new):
                                chosen[new.name] = self._refit(new, old)
                        self._advance(self.original, number)
                    # What layers did that are gone is asked of the last projection before them.
                    self._pass_over(range(number + 1, [*kept, layers][place + 1]), progress)
                    for _, new in ends:
                        if self._meets_stream(new):
                            chosen[new.name] = self._refit(new, None)
                    self._advance(self.pruned, place)
                progress.advance(note=f"layer {number}")
        return chosen

    def _meets_stream(self, end: Projection) -> bool:
        """Whether nothing but this projection stands between its inputs and the stream that leaves the layer."""
        return end.last and self._bare

    def _pass_over(self, removed: range, progress: Progress) -> None:
        """Take the original's states through layers that the pruned model lacks."""
        for number in removed:
            with self.original.loaded(number):
                self._advance(self.original, number)
            progress.advance(note=f"layer {number}")

    def _enter(self) -> None:
        with torch.inference_mode():
            for batch in (*self.fitted, *self.held_out):
                ids = torch.from_numpy(self.split.rows(self.rows[batch])).to(self.device)
                for model, states in self.states.items():
                    states.write(batch, model.enter(ids))
        for states in self.states.values():
            states.layer_done()

    def _advance(self, model: StreamedModel, number: int) -> None:
        states = self.states[model]
        for batch in (*self.fitted, *self.held_out):
            states.write(batch, model.layer(number, states.read(batch, self.device)))
        states.layer_done()

    def _refit(self, new: Projection, old: Projection | None) -> float | None:
        """Fit one projection of the pruned model, in memory and in its file; its damping.

        `old` is the original's, None where the stream that leaves the layer is the target.
        """
        change, damping = correction(self._gathered(new, old, self.fitted), self._gathered(new, old, self.held_out))
        if damping is None:
            return None
        module = self.pruned.model.get_submodule(new.module)
        if module.bias is not None:
            self._replace(module.bias, new.name.removesuffix(".weight") + ".bias", change[-1])
            change = change[: len(change) - 1]
        self._replace(module.weight, new.name, change.t() if new.dims[0] == "hidden" else change)
        return damping

    def _gathered(self, new: Projection, old: Projection | None, batches: list[slice]) -> Moments:
        """Second moments of what enters the pruned projection and of what is missing at its output.

        Missing is what would make the residual stream that of the original, errors of earlier layers included; behind
        a norm, which would not let them through as they are, what would make the output that of the original.
        """
        module = self.pruned.model.get_submodule(new.module)
        biased = module.bias is not None
        inputs = module.weight.shape[new.dims.index(new.tap.dims)]
        moments = Moments(inputs + biased, self.pruned.shape["hidden"], wide_device(self.device))
        for batch in batches:
            entering, left = self._heard(self.pruned, new, "input", batch)
            if old is None:
                stream = self._entered(self.original, batch)
                missing = (self._as_pruned(stream) - left) / new.factor
            else:
                target, stream = self._heard(self.original, old, "output", batch)
                missing = self._as_pruned(target) - module(entering.to(module.weight.dtype)).float()
                if self._bare and new.first:
                    before = self._as_pruned(self._entered(self.original, batch)) - self._entered(self.pruned, batch)
                    missing += before / new.factor
            if biased:
                entering = torch.cat([entering, torch.ones_like(entering[:, :1])], dim=1)
            # Divided as the next norm will: else the few tokens of huge states would decide alone.
            scale = stream.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            moments.add(entering / scale, missing / scale)
        return moments

    def _entered(self, model: StreamedModel, batch: slice) -> torch.Tensor:
        """The states that enter a model's next layer, (tokens, hidden) fp32."""
        return self.states[model].read(batch, self.device).flatten(0, -2).float()

    def _heard(
        self, model: StreamedModel, end: Projection, side: Literal["input", "output"], batch: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What one side of a projection carries, and what leaves its layer: (tokens, channels) each, fp32."""
        heard: list[torch.Tensor] = []
        placed = PlacedTap.at(model.model, "end", replace(end.tap, side=side), end.layer)
        with listening([placed], lambda _, activation: heard.append(activation)):
            leaving = model.layer(end.layer, self.states[model].read(batch, self.device))
        (activation,) = heard
        return activation.flatten(0, -2).float(), leaving.flatten(0, -2).float()

    def _as_pruned(self, states: torch.Tensor) -> torch.Tensor:
        """States of the original's stream in the channels of the pruned one."""
        if self._basis is not None:
            return states @ self._basis
        return states if self._kept is None else states[:, self._kept]

    def _replace(self, parameter: torch.Tensor, name: str, change: torch.Tensor) -> None:
        """Add to a parameter as it is stored, and go on with what was stored."""
        checkpoint = self.pruned.checkpoint
        entry = checkpoint.entries[name]
        stored = (checkpoint.read(name).double() + change.cpu()).to(TORCH_DTYPES[entry.dtype]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise RunError(f"The repaired {name} does not fit into {entry.dtype}; prune with --repair off.")
        write_at(entry.file, entry.offsets[0], stored.view(torch.uint8).numpy())
        parameter.copy_(stored)


def memory_of(
    checkpoint: Checkpoint, pruned: Shape, samples: int, batch_size: int, seq_len: int, device: torch.device,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Bytes of disk for the states of both models between two layers; 0 where memory holds them.

    Raises:
        ResourceError: one layer of both models, a batch and the moments of a projection do not fit into memory.
    """
    weights = weight_bytes(checkpoint, dtype.itemsize)
    largest = max(size for layer, size in weights.items() if layer is not None)
    width = max(size(parse(end.tap.dims), pruned.sizes) + 1 for ends in projections(pruned).values() for end in ends)
    hidden = checkpoint.shape["hidden"]
    batch = batch_size * seq_len * max(6 * hidden, 4 * checkpoint.shape.inner) * 4
    parts = {
        "embeddings and heads": 2 * weights[None],
        "a layer of both models": 3 * largest,
        "activations": 2 * batch,
        # Sums of fitted and held-out rows, both together, and one damped copy with its factor.
        "second moments": 8 * (6 * width * width + 6 * width * pruned["hidden"]),
    }
    require_memory(parts, device, "use a smaller --batch-size, a device with more memory, or --repair off")
    states = samples * seq_len * (hidden + pruned["hidden"]) * dtype.itemsize
    return 2 * states if states > (available_bytes(device) - sum(parts.values())) // 2 else 0
