"""A stock model whose decoder layers are in memory all at once, or one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.errors import CheckpointError
from minitron_cli.models.layerwise import LayerwiseModel
from minitron_cli.models.load import LOADING, load_model, stock_config
from minitron_cli.runtime.memory import give_back_freed
from minitron_cli.shape import expert_of


class ResidentModel(LayerwiseModel):
    """All layers in memory."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(load_model(checkpoint.path, device=device, dtype=dtype), checkpoint.shape)
        self.device, self.dtype = device, dtype

    def loaded(self, number: int) -> AbstractContextManager[None]:
        """Layers are always there."""
        return nullcontext()


class StreamedModel(LayerwiseModel):
    """The frame (embeddings, final norm, head) stays; a layer is in memory inside `with model.loaded(number)`."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frame.

        Raises:
            CheckpointError: the stock class refuses the config, or wants a weight that the files do not hold.
        """
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.names: dict[int | None, list[str]] = {None: []}
        for name, (_, layer) in checkpoint.declared.items():
            self.names.setdefault(layer, []).append(name)
        self.model = skeleton(checkpoint, dtype)
        self._load(None)
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(device)
        self.model.tie_weights()
        super().__init__(self.model, checkpoint.shape)
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        _require_whole({n: p for n, p in self.model.named_parameters() if id(p) not in inside})

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Hold one layer's weights for the length of the block.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        layer = self.layers[number]
        self.fill(number)
        try:
            yield
        finally:
            for module in layer.modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[leaf] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            give_back_freed()

    def fill(self, number: int) -> None:
        """Read one layer's weights, for good.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        self._load(number)
        _require_whole(dict(self.layers[number].named_parameters()))

    def _load(self, layer: int | None) -> None:
        """Read the tensors of one layer, or of the frame; the stock loader's own conversions apply.

        What it stacks exists three times for a moment: the two projections into the experts are stacked before the one
        out of them is read, so that this is never the whole layer.
        """
        into, out = ([name for name in self.names[layer] if self._enters_experts(name) == way] for way in (True, False))
        mapping = get_model_conversion_mapping(self.model)
        for names in filter(None, (into, out)):
            tensors = {name: _Unread(self.checkpoint, name) for name in names}
            config = LoadStateDictConfig(dtype=self.dtype, device_map={"": self.device}, weight_mapping=mapping)
            convert_and_load_state_dict_in_model(self.model, tensors, config)

    def _enters_experts(self, name: str) -> bool:
        return expert_of(name) is not None and self.checkpoint.declared[name][0].dims[0] == "expert_ffn"


@dataclass(frozen=True)
class _Unread:
    """A tensor that the stock loader reads when it needs it, and lets go when it is converted."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, everything: Any) -> torch.Tensor:
        return self.checkpoint.read(self.name)


def open_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, streamed: bool
) -> ResidentModel | StreamedModel:
    """The whole model, or its frame and one layer at a time."""
    return (StreamedModel if streamed else ResidentModel)(checkpoint, device=device, dtype=dtype)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model without weights: parameters on the meta device, computed buffers (rotary tables) real."""
    with LOADING, init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(stock_config(checkpoint.config), dtype=dtype)
    return model.eval()


def weight_bytes(checkpoint: Checkpoint, itemsize: int) -> dict[int | None, int]:
    """Bytes in memory of each decoder layer, and of the frame under None."""
    sizes: dict[int | None, int] = {None: 0}
    for name, (_, layer) in checkpoint.declared.items():
        count = math.prod(checkpoint.entries[name].shape)
        sizes[layer] = sizes.get(layer, 0) + count * itemsize
    return sizes


def _require_whole(parameters: dict[str, torch.nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise CheckpointError(
                f"The stock class wants {name}, which the files do not hold; the checkpoint is not whole."
            )
