"""Candidates without writing them: cut in memory from one checkpoint, and their zero-shot losses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron_cli.checkpoint.reader import Checkpoint, Entry
from minitron_cli.evaluate.perplexity import evaluate_split, output_losses
from minitron_cli.importance.activations import Activations
from minitron_cli.models.load import model_from_tensors
from minitron_cli.models.streaming import StreamedModel, weight_bytes
from minitron_cli.prune.execute import cut_tensors
from minitron_cli.prune.plan import PrunePlan, planned_config
from minitron_cli.runtime.memory import available_bytes, require_memory
from minitron_cli.runtime.progress import byte_size, say
from minitron_cli.shape import Shape
from minitron_cli.tokens import Split

CPU = torch.device("cpu")


def cut_in_memory(checkpoint: Checkpoint, plan: PrunePlan, device: torch.device, dtype: torch.dtype) -> Any:
    """The pruned model without writing it."""
    tensors = {planned.name: read() for planned, read in cut_tensors(checkpoint, plan)}
    model = model_from_tensors(planned_config(checkpoint.shape, plan), tensors, device=device, dtype=dtype)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == plan.params_after, f"the plan says {plan.params_after:,} parameters, the model has {counted:,}"
    return model


class CutCheckpoint(Checkpoint):
    """A checkpoint as a plan would leave it: names, types and shapes of the result; a tensor is cut when it is read."""

    def __init__(self, checkpoint: Checkpoint, plan: PrunePlan) -> None:
        self.path = checkpoint.path
        self.config = planned_config(checkpoint.shape, plan)
        self.shape = Shape.of(self.config)
        made = {planned.name: (planned, read) for planned, read in cut_tensors(checkpoint, plan)}
        self._cuts = {name: read for name, (_, read) in made.items()}
        self.shape = replace(self.shape, family=self.shape.family.as_stored(made))
        self.entries = {
            name: Entry(name, checkpoint.path, planned.dtype, planned.shape, (0, planned.nbytes))
            for name, (planned, _) in made.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, cut, in its own dtype, on the CPU."""
        return self._cuts[name]()


class ZeroShot:
    """Validation losses of candidates as they are cut, whole in memory where they fit, else one layer at a time.

    Both give the same numbers to the bit, so that what fits decides nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: Split,
        *,
        sequences: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
    ) -> None:
        """`sequences` of the split are read, `batch_size` at a time; `scratch`: a file for states between layers."""
        self.checkpoint, self.split, self.device, self.dtype = checkpoint, split, device, dtype
        self.sequences, self.batch_size = min(sequences, len(split)), batch_size
        self.scratch = scratch

    def loss(self, plan: PrunePlan) -> float:
        """Nats per token.

        Raises:
            RunError: it is not finite.
        """
        cut = CutCheckpoint(self.checkpoint, plan)
        if self.resident_fits(cut):
            return self.resident_loss(plan)
        say(f"{cut.shape.label()}: one layer at a time in memory.")
        return self.streamed_loss(cut)

    def resident_fits(self, cut: CutCheckpoint) -> bool:
        """Whether a whole candidate and a batch's activations fit."""
        weights = sum(weight_bytes(cut, self.dtype.itemsize).values())
        # A tensor is read in the type on disk before it is converted.
        return weights + max(entry.nbytes for entry in cut.entries.values()) + self._batch(cut) <= available_bytes(
            self.device
        )

    def require(self, plan: PrunePlan) -> None:
        """Refuse a candidate of which not even one layer at a time fits.

        Raises:
            ResourceError: it does not.
        """
        cut = CutCheckpoint(self.checkpoint, plan)
        if not self.resident_fits(cut):
            sizes = weight_bytes(cut, self.dtype.itemsize)
            layer = 2 * max(size for number, size in sizes.items() if number is not None)
            parts = {"embeddings and head": sizes[None], "one layer": layer, "activations": self._batch(cut)}
            require_memory(parts, self.device, "use a smaller --batch-size, or a device with more memory")

    def _batch(self, cut: CutCheckpoint) -> int:
        """Bytes of the widest activations of one batch."""
        widest = max(6 * cut.shape["hidden"], 4 * cut.shape.inner)
        return self.batch_size * int(self.split.tokens.shape[1]) * widest * 4

    def resident_loss(self, plan: PrunePlan) -> float:
        """With the whole candidate in memory."""
        model = cut_in_memory(self.checkpoint, plan, self.device, self.dtype)
        with torch.inference_mode():
            found = evaluate_split(model, self.split, batch_size=self.batch_size, max_sequences=self.sequences)
        return found.loss

    def streamed_loss(self, cut: CutCheckpoint) -> float:
        """With one layer in memory: all sequences pass it, then the next is read."""
        model = StreamedModel(cut, device=self.device, dtype=self.dtype)
        batches = [
            slice(start, min(start + self.batch_size, self.sequences))
            for start in range(0, self.sequences, self.batch_size)
        ]
        states = self._states(cut)
        with torch.inference_mode():
            for rows in batches:
                ids = self.split.rows(range(rows.start, rows.stop))
                states.write(rows, model.enter(torch.from_numpy(ids).to(self.device)))
            states.layer_done()
            for number in range(len(model.layers)):
                with model.loaded(number):
                    for rows in batches:
                        states.write(rows, model.layer(number, states.read(rows, self.device)))
                states.layer_done()

            def losses_of(rows: range, ids: torch.Tensor) -> torch.Tensor:
                hidden = states.read(slice(rows.start, rows.stop), self.device)
                return output_losses(model.model, model.leave(hidden), ids)

            found = evaluate_split(
                model.model, self.split, batch_size=self.batch_size, max_sequences=self.sequences, losses_of=losses_of
            )
        return found.loss

    def _states(self, cut: CutCheckpoint) -> Activations:
        """Room for the states of all sequences: on the device or in main memory if half of what is free suffices."""
        size = (self.sequences, int(self.split.tokens.shape[1]), cut.shape["hidden"])
        needed = math.prod(size) * self.dtype.itemsize
        place = next((place for place in (self.device, CPU) if needed <= available_bytes(place) // 2), None)
        if place is None:
            say(f"States between layers are held on disk: {byte_size(2 * needed)}.")
        return Activations(size, self.dtype, self.scratch, place=place)
