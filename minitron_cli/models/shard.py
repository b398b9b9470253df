"""Stock models whose weights are split over processes by torch's `fully_shard` (FSDP2).

Each decoder layer is a unit that is gathered for its forward pass and for its backward pass, and so are the input
embeddings; the rest of the backbone (final norm, positions) is the root. The output head is no unit: its weight is
gathered once per micro-batch by whoever makes logits (models/head.py), in chunks that a unit's hooks would gather again
and again. Parameters are DTensors, split along their first dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minitron_cli.checkpoint.multimodal import is_wrapped
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.errors import ConfigError, FamilyError
from minitron_cli.models.head import backbone_of
from minitron_cli.models.layerwise import layer_list
from minitron_cli.models.split import is_split
from minitron_cli.runtime.group import Group
from minitron_cli.shape import Shape


@dataclass(frozen=True)
class Sharding:
    """How a model is spread: split into `parts`, each held by `group.size / parts` processes.

    `dtype`: what layers compute in; weights that are trained stay fp32 and are gathered in it. `keep_gathered`: until
    the backward pass. `offload`: the parts lie in main memory.
    """

    group: Group
    device: torch.device
    parts: int
    dtype: torch.dtype
    keep_gathered: bool = False
    offload: bool = False

    def mesh(self) -> Any:
        """The processes as torch's device mesh: copies by parts, or only parts where there is one copy."""
        from torch.distributed.device_mesh import init_device_mesh

        copies = self.group.size // self.parts
        if copies == 1:
            return init_device_mesh(self.device.type, (self.parts,), mesh_dim_names=("part",))
        return init_device_mesh(self.device.type, (copies, self.parts), mesh_dim_names=("copy", "part"))

    def load(self, checkpoint: Checkpoint, *, trained: bool) -> Any:
        """The stock model in its parts; no process holds more than one whole layer, or the embeddings and the head.

        Raises:
            CheckpointError: the stock class refuses the config, or weights are missing.
            ConfigError, FamilyError: it cannot be split.
        """
        from minitron_cli.models.streaming import StreamedModel

        if is_wrapped(checkpoint.path):
            raise ConfigError(
                f"{checkpoint.path} is a multimodal checkpoint, which cannot be split over processes; extract its text "
                "part with `minitron prune --text-only`, or use one process."
            )
        dtype = torch.float32 if trained else self.dtype
        streamed = StreamedModel(checkpoint, device=self.device, dtype=dtype)
        streamed.model.requires_grad_(trained)
        return self._split(streamed.model, _loaded(streamed, trained), trained=trained)

    def split(self, model: Any, shape: Shape, *, trained: bool) -> Any:
        """Split a model that every process holds, with equal weights."""
        model.requires_grad_(trained)
        return self._split(model, layer_list(model, shape)[2], trained=trained)

    def _split(self, model: Any, layers: Iterable[torch.nn.Module], *, trained: bool) -> Any:
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh, narrow = self.mesh(), trained and self.dtype.itemsize < 4
        # Autocast decides which products are narrow, as in one process, so inputs are left as they are; layers are
        # gathered in the type that it would round them to, and gradients are summed in fp32.
        layer_policy = MixedPrecisionPolicy(self.dtype if narrow else None, torch.float32, cast_forward_inputs=False)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not self.keep_gathered}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head.weight is embeddings.weight
        for layer in layers:
            fully_shard(layer, mp_policy=layer_policy, **options)
        fully_shard(embeddings, mp_policy=policy, **options).set_unshard_in_backward(False)  # a look-up needs only ids
        fully_shard(backbone_of(model), mp_policy=policy, **options)
        _split_head(head, mesh, tied_to=embeddings.weight if tied else None)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the loss is a sum over all processes, divided by all tokens already
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for name, parameter in model.named_parameters():
            if not is_split(parameter):
                raise FamilyError(f"{name} lies outside the layers and the head, so this model cannot be split.")
        return model


def _loaded(streamed: Any, trained: bool) -> Iterator[torch.nn.Module]:
    """One layer after the other with its weights; whoever takes it splits it before the next one is read."""
    for number, layer in enumerate(streamed.layers):
        streamed.fill(number)
        yield layer.requires_grad_(trained)


def _split_head(head: Any, mesh: Any, tied_to: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for name, parameter in list(head.named_parameters(recurse=False)):
        if name == "weight" and tied_to is not None:
            head.weight = tied_to
            continue
        # Every process has it whole: nothing needs to travel.
        part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        setattr(head, name, torch.nn.Parameter(part, requires_grad=parameter.requires_grad))
