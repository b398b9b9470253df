"""Shape: an architecture as numbers, and what it costs, in closed form from config.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_cli.families import family_for
from minitron_cli.families.schema import Family, lookup

SHOWN = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
"""Axes every report shows, in this order, where the family has them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one architecture.

    `sizes` maps axis to size; `tags` holds the tags of each layer. Build with `Shape.of(config)`.
    """

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a config.json dictionary.

        Raises:
            FamilyError: unknown model type.
            ShapeError: a size is missing or senseless.
        """
        family = family_for(config)
        return cls(family, config, family.sizes(config))

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def shown(self) -> dict[str, int]:
        """The axes people speak of, for printing and JSON."""
        order = [*SHOWN, *(axis.name for axis in self.family.axes if axis.key and axis.name not in SHOWN)]
        return {name: self.sizes[name] for name in order if name in self.sizes}

    def label(self) -> str:
        """A short name: `32L-4096h-14336f-32/8x128`."""
        s = self.sizes
        label = f"{s['layers']}L-{s['hidden']}h"
        if "ffn" in s:
            label += f"-{s['ffn']}f"
        if {"heads", "kv_heads", "head_dim"} <= s.keys():
            label += f"-{s['heads']}/{s['kv_heads']}x{s['head_dim']}"
        return label

    @property
    def params(self) -> int:
        """Parameters of the stock class: tied tensors once, no buffers."""
        return sum(
            math.prod(self.family.tensor_shape(tensor, self.sizes))
            for _, tensor, _ in self.family.expected(self.config)
            if tensor.role != "buffer"
        )

    @property
    def params_embedding(self) -> int:
        """Parameters of tensors that have a vocabulary dimension (input embedding, untied head)."""
        return sum(
            math.prod(self.family.tensor_shape(tensor, self.sizes))
            for _, tensor, _ in self.family.expected(self.config)
            if "vocab" in tensor.dims
        )

    @property
    def params_non_embedding(self) -> int:
        """`params` without the tensors that have a vocabulary dimension."""
        return self.params - self.params_embedding

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """KV-cache bytes per token of context, over all layers (windows counted as full attention)."""
        return self.family.cached_elements(self.config) * element_bytes

    def flops_per_token(self) -> int:
        """Multiply-adds of one forward pass times two, matrices only (attention over the context left out)."""
        head = self.sizes["vocab"] * self.sizes["hidden"]
        return 2 * (self.params_non_embedding + head)

    def dtype_bytes(self) -> int:
        """Bytes per element of the dtype the config names (2 where it names none)."""
        name = str(lookup(self.config, "dtype") or lookup(self.config, "torch_dtype") or "bfloat16")
        return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}.get(name.removeprefix("torch."), 2)
