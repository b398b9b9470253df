"""What a plan does to one tensor on disk: which positions stay, and by what the values that stay are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from minitron_cli.checkpoint.blocks import Array, Choice
from minitron_cli.checkpoint.reader import tensor_of
from minitron_cli.checkpoint.surgery import Indices, of_term, positions, softmax_fold
from minitron_cli.families.expression import axes, parse
from minitron_cli.families.schema import Tensor
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.shape import Shape

Factors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Edit:
    """A tensor of the original by its name there, and the plan; `expert` is the routed one that it belongs to."""

    shape: Shape
    plan: PrunePlan
    name: str
    tensor: Tensor
    layer: int | None
    dtype: str
    expert: int | None = None

    def choice(self) -> Choice:
        """What stays, and what is done to it."""
        selections = self.selections()
        if self.factor == 1.0 and not self._folds:
            return Choice(selections)
        return Choice(selections, partial(_multiplied, self.scales(selections), self.offset, self.dtype))

    def selections(self, *, whole: str = "") -> list[Indices]:
        """Kept positions of every dimension; of the axis `whole` all are kept."""
        within = {axis.name: axis.within for axis in self.shape.family.axes if axis.within}
        kept = {name: units for name, units in self.plan.kept(self.layer).items() if name != whole}
        outer = {} if self.expert is None else {"experts": self.expert}
        return [positions(parse(text), self.shape.sizes, kept, within, outer) for text in self.tensor.dims]

    def scales(self, selections: list[Indices]) -> list[Factors]:
        """Factors of the kept positions of every dimension; their product is what a value is multiplied by."""
        pairs = zip(self.tensor.dims, selections, strict=True)
        scales = [self._queries(text, chosen) for text, chosen in pairs]
        scales[0] = scales[0] * np.float32(self.factor)
        return scales

    @cached_property
    def offset(self) -> float:
        """What the stock class adds to the stored values of a norm before it applies them."""
        norm = self.tensor.norm or self.shape.family.norm
        return norm.offset if self.tensor.role in ("norm", "query_norm") else 0.0

    @cached_property
    def factor(self) -> float:
        """The plan's factor on the whole tensor."""
        return self.plan.rescale.get(self.name, 1.0)

    @property
    def _folds(self) -> bool:
        """Whether queries among the values take over a part of the softmax scale."""
        old, new = self.shape.sizes.get("head_dim"), self.plan.sizes.get("head_dim")
        return self.tensor.role in ("query", "query_norm") and bool(old and new) and old != new

    def _queries(self, text: str, chosen: Indices) -> Factors:
        expression = parse(text)
        if not self._folds or "head_dim" not in axes(expression):
            return np.ones(len(chosen), np.float32)
        fold = softmax_fold(self.shape["head_dim"], self.plan.sizes["head_dim"])
        return np.where(of_term(expression, self.shape.sizes)[chosen], fold, 1.0).astype(np.float32)


def _multiplied(scales: list[Factors], offset: float, dtype: str, values: Array, at: tuple[slice, ...]) -> Array:
    """Multiply kept values; of a norm that applies w + offset, what it applies."""
    import torch

    scale = torch.ones((), dtype=torch.float32)
    for dim, (along, part) in enumerate(zip(scales, at, strict=True)):
        scale = scale * torch.from_numpy(along[part]).view([-1 if each == dim else 1 for each in range(len(at))])
    kept = tensor_of(values, dtype, values.shape)
    product = kept.to(torch.float32).add_(offset).mul_(scale).sub_(offset).to(kept.dtype)
    return product.view(torch.uint8).numpy().view(values.dtype)
