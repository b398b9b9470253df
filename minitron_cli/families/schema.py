"""What a family file says: two tables (tensors on disk, taps in the stock model) and the facts weights cannot show.

Everything here is data with small readings of a `config.json` dictionary. No torch, no transformers.

Vocabulary
    axis      a size of the architecture: hidden, ffn, heads (as `group` inside `kv_heads`), head_dim, layers, ...
    tag       a word a layer rule gives a layer ("moe", "mamba", "sliding_attention"); tensors and taps may require one
    condition a config key that must be truthy ("attention_bias") or falsy ("!tie_word_embeddings")

Absent and null differ, as in the stock config classes: an absent key takes the class's field default (`defaults`), an
explicit null takes what the class computes from null (`Axis.default`), or means "none".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from minitron_cli.errors import FamilyError, ShapeError
from minitron_cli.families.expression import axes, parse, size
from minitron_cli.families.parts import Axis, Divides, Least, Norm, Rotary, Tap, Tensor, unscaled, without
from minitron_cli.families.reading import Config, LayerRule, formula, holds, lookup

__all__ = [
    "BYTES", "Axis", "Config", "Divides", "Family", "LayerRule", "Least", "Norm", "Rotary", "Tap", "Tensor",
    "formula", "holds", "lookup", "unscaled", "without",
]  # fmt: skip

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes."""


@dataclass(frozen=True)
class Family:
    """One model family. `model_types` are the values of `model_type` in config.json it answers for.

    taps            kind to where it is read: hidden (outputs of norms), attention, mixer and ffn (inputs of the
                    projections that end attention, Mamba or linear attention, and MLP), mlp (what enters the MLP),
                    query, key and value or the fused qkv (outputs of the projections), experts (the module that holds
                    the routed ones), block (decoder layers), head, nested (see there); others only give scores
    when            conditions it also asks: one model type may have several layouts, each a family of its own
    defaults        field defaults of the stock config class, where published configs leave keys out
    spellings       further spelling of a config key to the key; the stock class reads both
    layer_rules     each gives every layer at most one tag
    required        tag that at least one layer must have, to the stock line that fails without
    coupled         axis to the expression the stock class forces it to equal; whichever side is not asked for follows
    stacked         tensors that hold all experts of a layer, in files that have these instead of one per expert
    modules         what names on disk begin with, and what the stock model's modules begin with instead
    nested          axes that are chosen one after another from the taps "nested", innermost first: channels of a head,
                    heads by what they put out in the channels that stay, groups by what is left of them; the taps'
                    part holds them row by row, outermost first
    prefix          module prefix that published checkpoints may lack on every name ("transformer." of gpt2)
    tied            tensor to the tensor it is tied to, names on disk
    readers         norm to the linears that read its output, names on disk, where nothing else reads the residual
                    stream or scales its channels: only such a stream can be rotated; empty for all others
    post_norms      whether a norm stands between what a sublayer puts out and the residual stream, or on the sum
    residual_key    config key of a factor on what a sublayer adds to the residual stream, or one per kind of tap; 1
                    where there is none
    ignored         patterns (full matches) of legacy tensors that mean nothing
    dropped         pattern to notice: tensors the stock class does not load; see `dropped_notice`
    dropped_config  what config.json must say once they are gone
    cache           layer tag ("" for every layer) to elements the KV cache holds per token in such a layer
    state           layer tag to elements of recurrent state that such a layer holds per sequence, whatever its length
    scan            numbers that the scan of a recurrent layer holds per token, `chunk` being the tokens of a chunk, and
                    the config key of these, or their number where the class fixes it
    attention       multiply-adds of one query token against one token of context, in a layer that has a cache
    window_key      config key of the tokens that a layer tagged "sliding_attention" keeps
    least           smallest sizes that the stock class can run
    chosen_key      config key of the routed experts that each token passes; their number where the class fixes it
    choosable       formula of the most that it can pass
    unpadded        condition under which padding before a sequence changes what the stock class makes of it, to why
    embed_scale     axis whose square root multiplies the embeddings ("hidden" in Gemma)
    softcap_key     config key of the cap c in logits = c * tanh(logits / c)
    draft           tensors are explained (inspect works) and pruning is refused until the family is proven
    """

    name: str
    model_types: tuple[str, ...]
    axes: tuple[Axis, ...]
    tensors: Mapping[str, Tensor]
    taps: Mapping[str, tuple[Tap, ...]] = field(default_factory=dict)
    when: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    layer_rules: tuple[LayerRule, ...] = ()
    required: Mapping[str, str] = field(default_factory=dict)
    divides: tuple[Divides, ...] = ()
    coupled: Mapping[str, str] = field(default_factory=dict)
    norm: Norm = field(default_factory=Norm)
    rotary: Rotary | None = None
    stacked: Mapping[str, Tensor] = field(default_factory=dict)
    modules: tuple[str, str] = ("", "")
    nested: tuple[str, ...] = ()
    prefix: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    post_norms: bool = False
    residual_key: str | Mapping[str, str] = ""
    ignored: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    dropped_config: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=lambda: {"": "kv_heads*(head_dim + v_head_dim)"})
    state: Mapping[str, str] = field(default_factory=dict)
    scan: tuple[str, str | int] = ("", 0)
    attention: str = "heads*(head_dim + v_head_dim)"
    window_key: str = "sliding_window"
    least: tuple[Least, ...] = ()
    chosen_key: str | int = "num_experts_per_tok"
    choosable: str = "experts"
    unpadded: Mapping[str, str] = field(default_factory=dict)
    embed_scale: str = ""
    softcap_key: str = ""
    draft: bool = False

    def axis(self, name: str) -> Axis:
        """The axis of that name.

        Raises:
            FamilyError: the family has no such axis.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis
        known = ", ".join(axis.name for axis in self.axes if axis.prunable)
        raise FamilyError(f"{self.name} has no axis '{name}'; it can cut {known}.")

    def answers_for(self, config: Config) -> bool:
        """Whether this family explains that config."""
        full = self.with_defaults(config)
        return config.get("model_type") in self.model_types and all(holds(full, each) for each in self.when)

    @cached_property
    def cut_axes(self) -> tuple[Axis, ...]:
        """Axes whose units are chosen: those that dimensions are made of and that a cut may change."""
        used = {name for tensor in self.declarations() for dim in tensor.dims for name in axes(parse(dim))}
        derived = {axis.name for axis in self.axes if not axis.key and not axis.why_not}
        return tuple(axis for axis in self.axes if axis.name in used and (axis.prunable or axis.name in derived))

    def declarations(self) -> Iterator[Tensor]:
        """Every declaration of the table, alternatives included."""
        for tensor in self.tensors.values():
            here: Tensor | None = tensor
            while here is not None:
                yield here
                here = here.otherwise

    def axes_with(self, *changed: Axis, without: str = "") -> tuple[Axis, ...]:
        """This family's axes with some replaced (by name) or added at the end, and without one."""
        by_name = {axis.name: axis for axis in changed}
        own = {axis.name for axis in self.axes}
        return (
            *(by_name.get(axis.name, axis) for axis in self.axes if axis.name != without),
            *(axis for axis in changed if axis.name not in own),
        )

    def with_defaults(self, config: Config) -> Config:
        """The config with the stock class's defaults under absent keys; an explicit null stays (see the module)."""
        spelled = {key: config[other] for other, key in self.spellings.items() if other in config}
        return {**self.defaults, **spelled, **config}

    def sizes(self, config: Config) -> dict[str, int]:
        """Every axis's size, read from the config or computed as the stock class does.

        Raises:
            ShapeError: a size is missing or not a positive whole number.
        """
        full = self.with_defaults(config)
        sizes: dict[str, int] = {}
        for axis in self.axes:
            value = axis.read(full)
            if value is None:
                value = axis.default if not isinstance(axis.default, str) else formula(axis.default, sizes)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ShapeError(f"config.json: '{axis.key or axis.name}' must be a whole number, got {value!r}.")
            sizes[axis.name] = value
        return sizes

    def chosen_experts(self, config: Config, sizes: Mapping[str, int]) -> int:
        """Routed experts that each token passes: as many as the config says, or as the router can choose; 0: dense."""
        if "experts" not in sizes:
            return 0
        fixed = isinstance(self.chosen_key, int)
        told = self.chosen_key if fixed else lookup(self.with_defaults(config), str(self.chosen_key))
        most = formula(self.choosable, sizes)
        return min(told, most) if isinstance(told, int) and told > 0 else most

    def taken_apart(self, tensor: Tensor) -> Tensor | None:
        """What a stacked tensor holds of each expert, where experts choose their own units; None for all others."""
        if tensor.dims[0] != "experts":
            return None
        own = {axis.name for axis in self.axes if axis.within == "experts"}
        nested = any(axes(parse(dim)) & own for dim in tensor.dims[1:])
        return replace(tensor, dims=tensor.dims[1:]) if nested else None

    def layer_tags(self, config: Config, layers: int) -> list[frozenset[str]]:
        """The tags of each layer."""
        full = self.with_defaults(config)
        try:
            return [frozenset(rule.tag(full, layer) for rule in self.layer_rules) - {""} for layer in range(layers)]
        except (IndexError, KeyError, TypeError, ZeroDivisionError):
            keys = ", ".join(step.key for rule in self.layer_rules for step in rule.walk() if step.key)
            raise ShapeError(
                f"config.json: one of {keys} is too short or senseless for {layers} layers; the file is damaged."
            ) from None

    def expected(self, config: Config) -> Iterator[tuple[str, Tensor, int | None]]:
        """Every tensor a checkpoint with this config must hold: (name on disk, declaration, layer or None)."""
        full = self.with_defaults(config)
        sizes = self.sizes(config)
        tags = self.layer_tags(config, sizes["layers"])
        for pattern, tensor in self.tensors.items():
            for layer in range(sizes["layers"]) if "{layer}" in pattern else (None,):
                here = tensor.at(full, frozenset() if layer is None else tags[layer])
                if here is None:
                    continue
                name = pattern.replace("{layer}", str(layer))
                for expert in range(sizes["experts"]) if "{expert}" in pattern else (0,):
                    yield name.replace("{expert}", str(expert)), here, layer

    def tensor_shape(self, tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The size of each dimension."""
        return tuple(size(parse(dim), sizes) for dim in tensor.dims)

    def dropped_notice(self, name: str, layers: int) -> str | None:
        """The notice for a tensor that is dropped; None for any other.

        A named group `beyond` in the pattern must be a layer number past the model's own (multi-token prediction is
        stored as layer 61 of 61): an unexplained tensor of a real layer is never dropped.
        """
        for pattern, notice in self.dropped.items():
            match = re.fullmatch(pattern, name)
            if match and int(match.groupdict().get("beyond", layers)) >= layers:
                return notice
        return None

    def as_stored(self, names: Collection[str]) -> Family:
        """This family with the table that fits the names on disk."""
        known = "|".join(re.escape(name).replace(r"\{layer\}", r"\d+") for name in self.stacked)
        if not known or not any(re.fullmatch(known, name) for name in names):
            return self
        tensors = {name: tensor for name, tensor in self.tensors.items() if "{expert}" not in name}
        return replace(self, tensors={**tensors, **self.stacked}, stacked={})

    def module(self, name: str) -> str:
        """Where the stock model has what is called `name` on disk."""
        disk, memory = self.modules
        return memory + name.removeprefix(disk) if name.startswith(disk) else name

    def on_disk(self, module: str) -> str:
        """What is on disk of a module of the stock model."""
        disk, memory = self.modules
        return disk + module.removeprefix(memory) if module.startswith(memory) else module

    def residual_factor(self, config: Config, kind: str) -> float:
        """What the output of a projection is multiplied by before it joins the residual stream; `kind` as in taps."""
        key = self.residual_key if isinstance(self.residual_key, str) else self.residual_key.get(kind, "")
        found = lookup(config, key) if key else None
        return 1.0 if found is None else float(found)

    def cached_elements(self, config: Config) -> int:
        """Elements the KV cache holds per token of context, over all layers; windows count as full attention."""
        sizes = self.sizes(config)
        tags = self.layer_tags(config, sizes["layers"])
        per_tag = {tag: size(parse(text), sizes) for tag, text in self.cache.items()}
        return sum(count for layer in tags for tag, count in per_tag.items() if not tag or tag in layer)
