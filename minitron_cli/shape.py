"""Shape: an architecture as numbers, and what it costs, in closed form from config.json alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitron_cli.families import family_for
from minitron_cli.families.expression import axes, parse, size
from minitron_cli.families.schema import Divides, Family, Tensor, holds, lookup

SHOWN = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
"""Axes every report shows, in this order, where the family has them."""

WINDOW = "sliding_attention"
"""Tag of layers that keep a window of the context."""

EXPERTS = re.compile(r"\.experts\.(?:(\d+)\.)?")
"""In names of routed experts on disk; with the number of the expert, where each has tensors of its own."""


def expert_of(name: str) -> int | None:
    """The routed expert that a tensor of this name belongs to; None where it belongs to none, or to all."""
    found = EXPERTS.search(name)
    return int(found[1]) if found and found[1] else None


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

    @cached_property
    def _layers_of(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for _, tensor, layer in self.family.expected(self.config):
            for axis in {name for dim in tensor.dims for name in axes(parse(dim))}:
                found.setdefault(axis, set()).update(() if layer is None else (layer,))
        return found

    def layers_with(self, axis: str) -> frozenset[int]:
        """The layers in which some tensor has units of the axis: all, or those of one kind."""
        return frozenset(self._layers_of.get(axis, ()))

    @cached_property
    def rules(self) -> tuple[Divides, ...]:
        """The divisibility rules that hold for a model like this."""
        config = self.family.with_defaults(self.config)
        return tuple(
            rule
            for rule in self.family.divides
            if not {rule.axis, rule.beside} & self.absent and all(holds(config, each) for each in rule.conditions)
        )

    @property
    def unpadded(self) -> str:
        """Why padding before a sequence changes what the stock class makes of it; "" where it does not."""
        config = self.family.with_defaults(self.config)
        return next((why for condition, why in self.family.unpadded.items() if holds(config, condition)), "")

    @property
    def layers_differ(self) -> bool:
        """Whether layers are of several kinds, so that it matters to sizes which ones leave."""
        layers = self["layers"]
        return any(0 < len(having) < layers for having in self._layers_of.values())

    @cached_property
    def absent(self) -> frozenset[str]:
        """Axes that no tensor of this config has, though others of the family do: experts without expert layers."""
        declared = {name for tensor in self.family.declarations() for dim in tensor.dims for name in axes(parse(dim))}
        derived = {axis.name: axis.default.split()[::2] for axis in self.family.axes if isinstance(axis.default, str)}
        used = {name for axis in self._layers_of for name in (axis, *derived.get(axis, ()))}
        missing = declared - used
        beside = {name for axis in missing for name in derived.get(axis, ())}
        if "experts" in missing:  # the groups that their router knows, too
            beside |= {name for name in self.family.choosable.split()[::2] if not name.isdigit()}
        return frozenset((missing | beside) - used)

    def shown(self) -> dict[str, int]:
        """The axes people speak of, for printing and JSON."""
        order = [*SHOWN, *(axis.name for axis in self.family.axes if axis.key and axis.name not in SHOWN)]
        return {name: self.sizes[name] for name in order if name in self.sizes and name not in self.absent}

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
        return sum(count for _, count in self._elements())

    @property
    def params_embedding(self) -> int:
        """Parameters of tensors that have a vocabulary dimension (input embedding, untied head)."""
        return sum(count for tensor, count in self._elements() if "vocab" in tensor.dims)

    @property
    def params_non_embedding(self) -> int:
        """`params` without the tensors that have a vocabulary dimension."""
        return self.params - self.params_embedding

    @property
    def params_active(self) -> int:
        """`params` without the routed experts that a token does not pass; `params` in a dense model."""
        return sum(count for _, count in self._elements(active=True))

    @property
    def experts_per_token(self) -> int:
        """Routed experts that each token passes; 0 in a dense model, all where the config does not say."""
        return self.family.chosen_experts(self.config, self.sizes)

    @property
    def inner(self) -> int:
        """Most channels that a token has inside a layer: of a dense MLP, of all experts that it passes, or a quarter of
        what a scan holds, which memory counts four times."""
        routed = self.experts_per_token * self.sizes.get("expert_ffn", 0) + self.sizes.get("shared_ffn", 0)
        text, told = self.family.scan
        if not text:
            return max(self.sizes.get("ffn", 0), routed)
        chunk = told if isinstance(told, int) else lookup(self.family.with_defaults(self.config), told)
        scan = size(parse(text), {**self.sizes, "chunk": chunk if isinstance(chunk, int) else 1})
        return max(self.sizes.get("ffn", 0), routed, -(-scan // 4))

    def _elements(self, *, active: bool = False) -> list[tuple[Tensor, int]]:
        """(declaration, elements of all tensors that follow it) of all parameters; `active`: of chosen experts."""
        chosen = self.experts_per_token
        counts: Counter[tuple[int, bool]] = Counter()
        tensors: dict[int, Tensor] = {}
        for name, tensor, _ in self.family.expected(self.config):
            number = EXPERTS.search(name) if active else None
            if tensor.role == "buffer" or (number and number[1] and int(number[1]) >= chosen):
                continue
            tensors[id(tensor)] = tensor
            counts[id(tensor), number is not None and not number[1]] += 1
        found = []
        for (key, stacked), count in counts.items():
            # A stacked tensor holds all experts: its outermost dimension shrinks to the chosen ones.
            sizes = {**self.sizes, "experts": chosen} if stacked else self.sizes
            found.append((tensors[key], count * math.prod(self.family.tensor_shape(tensors[key], sizes))))
        return found

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """KV-cache bytes per token of context, over all layers (windows counted as full attention)."""
        return self.family.cached_elements(self.config) * element_bytes

    def seen_tokens(self, context: int) -> list[int]:
        """Tokens of the context that each layer keeps: all, or its window."""
        window = lookup(self.family.with_defaults(self.config), self.family.window_key)
        kept = min(context, window) if isinstance(window, int) and window > 0 else context
        return [kept if WINDOW in tags else context for tags in self.family.layer_tags(self.config, self["layers"])]

    def state_bytes(self, element_bytes: int = 2) -> int:
        """Bytes of recurrent state (of convolutions too) that every sequence has, over all layers, at any length."""
        tags = self.family.layer_tags(self.config, self["layers"])
        per_tag = {tag: size(parse(text), self.sizes) for tag, text in self.family.state.items()}
        return element_bytes * sum(count for layer in tags for tag, count in per_tag.items() if not tag or tag in layer)

    def kv_bytes(self, context: int, element_bytes: int = 2) -> int:
        """What a server keeps of one sequence of `context` tokens: KV cache, of layers with a window that of the
        window, and recurrent state."""
        tags = self.family.layer_tags(self.config, self["layers"])
        per_tag = {tag: size(parse(text), self.sizes) for tag, text in self.family.cache.items()}
        cached = sum(
            seen * sum(count for tag, count in per_tag.items() if not tag or tag in layer)
            for layer, seen in zip(tags, self.seen_tokens(context), strict=True)
        )
        return element_bytes * cached + self.state_bytes(element_bytes)

    def flops_per_token(self, context: int = 0) -> int:
        """Floating-point operations of one forward pass per token, the token seeing `context` tokens.

        Two per parameter that the token meets outside the embedding (norms and biases counted like matrices), two per
        element of the head, two per multiply-add of attention over the context.
        """
        elements = self._elements(active=True)
        head = max(count for tensor, count in elements if "vocab" in tensor.dims)
        return 2 * (sum(count for tensor, count in elements if not tensor.is_table) + head + self._attention(context))

    def _attention(self, context: int) -> int:
        if not context:
            return 0
        per_pair = size(parse(self.family.attention), self.sizes)
        tags = self.family.layer_tags(self.config, self["layers"])
        cached = [any(not tag or tag in layer for tag in self.family.cache) for layer in tags]
        return sum(per_pair * seen for seen, has in zip(self.seen_tokens(context), cached, strict=True) if has)

    def dtype_bytes(self) -> int:
        """Bytes per element of the dtype the config names (2 where it names none)."""
        name = str(lookup(self.config, "dtype") or lookup(self.config, "torch_dtype") or "bfloat16")
        return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}.get(name.removeprefix("torch."), 2)
