"""What a calibration pass holds, before anything is loaded: does the model fit, and where do the states go?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.importance.experts import accumulator_bytes
from minitron_cli.importance.residual import collected
from minitron_cli.models.streaming import weight_bytes
from minitron_cli.runtime.memory import available_bytes, require_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PassMemory:
    """Bytes by part. `states`: the hidden states of all calibration sequences between two layers."""

    weights: int
    frame: int
    layer: int
    batch: int
    states: int
    device: torch.device

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, config: ImportanceConfig, seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> PassMemory:
        """From headers and config alone."""
        shape, sizes = checkpoint.shape, weight_bytes(checkpoint, dtype.itemsize)
        largest = max(size for layer, size in sizes.items() if layer is not None)
        # A layer is read in the type on disk and converted: both exist for a moment.
        widest = max(shape["hidden"] * 6, shape.inner * 4)
        # The second moment of the stream in fp64, and one batch's in fp32.
        further = collected(config, shape)
        moment = 12 * shape["hidden"] ** 2 if "directions" in further else 0
        experts = accumulator_bytes(shape, config.batch_size, weighted="weighted" in further)
        return cls(
            weights=sum(sizes.values()),
            frame=sizes[None],
            layer=2 * largest,
            batch=config.batch_size * seq_len * widest * 4 + moment + experts,
            states=config.samples * seq_len * shape["hidden"] * dtype.itemsize,
            device=device,
        )

    def resident_fits(self) -> bool:
        """Whether the whole model and a batch's activations fit."""
        return self.weights + self.batch <= available_bytes(self.device)

    def require(self) -> None:
        """Refuse what not even one layer at a time makes possible.

        Raises:
            ResourceError: the frame, a layer and a batch do not fit together.
        """
        parts = {"embeddings and head": self.frame, "one layer": self.layer, "activations": self.batch}
        require_memory(parts, self.device, "use a smaller --batch-size, or a device with more memory")

    def place(self) -> torch.device | None:
        """Where the states are held: the device or main memory if half of what is free there suffices; None: disk."""
        held = self.frame + self.layer + self.batch
        if self.states <= (available_bytes(self.device) - held) // 2:
            return self.device
        free = available_bytes(CPU) - (held if self.device.type == "cpu" else self.layer)
        return CPU if self.states <= free // 2 else None
