"""The parts a family file is made of: axes, tensors, taps, norms, rotation, divisibility rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minitron_cli.families.reading import Config, holds, lookup


@dataclass(frozen=True)
class Axis:
    """A size of the architecture.

    `key` is its config key (dots descend into nested sections); `default` is what the stock class computes when the
    key is absent or null: a number or a left-to-right formula over other axes ("hidden // heads", "4 * hidden").
    An axis without a key is always derived. `prunable` axes may be cut; `why_not` quotes the stock class otherwise.
    `within` makes the choice of units depend on another axis: members of `group` are chosen per KV head.
    `evenly` names the axis that counts equal runs of units, each of which keeps the same number (groups of experts).
    `follows` is the formula of a size that no tensor has and that the config must agree on once others are cut.
    `length_of` names per-layer lists whose length overrides `key` (Nemotron-H ignores num_hidden_layers): first wins.
    """

    name: str
    key: str = ""
    default: str | int | None = None
    prunable: bool = False
    why_not: str = ""
    within: str = ""
    evenly: str = ""
    per_layer: bool = False
    follows: str = ""
    length_of: tuple[str, ...] = ()

    def read(self, config: Config) -> Any:
        """What the config says of this size; None where it says nothing."""
        for key in self.length_of:
            entries = lookup(config, key)
            if isinstance(entries, (list, tuple, str)):
                return len(entries)
        value = lookup(config, self.key) if self.key else None
        return None if value == "auto" else value


@dataclass(frozen=True)
class Norm:
    """A normalisation: RMS or layer norm; `offset` 1.0 where the stock class applies 1 + w (Gemma).

    `eps` is used where the config has no `eps_key` (or the stock class reads none: ""). `per` names the outermost
    factor of the dimension when each of its units has statistics of its own (Mamba's gated norm: per group).
    `divided_by` is an axis by whose square root the stock class has divided what the norm reads, so that a cut of it
    moves `eps` alone.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps_key: str = "rms_norm_eps"
    offset: float = 0.0
    eps: float = 1e-6
    per: str = ""
    divided_by: str = ""


@dataclass(frozen=True)
class Tensor:
    """One tensor name on disk (`{layer}` and `{expert}` are indices) with an axis expression per dimension.

    `tags`: layer tags that must all be present; `conditions`: config conditions that must all hold; `otherwise`: the
    declaration that holds where they do not, for a name whose dimensions depend on the config or the layer.
    `role`: "norm" (statistics run over its one axis), "query" (carries the softmax scale of its head_dim; in a fused
    tensor the queries are the first term of the sum), "query_norm" (both: a norm of queries), "router" (gives each
    expert its score), "buffer" (saved, but not a parameter), or "". Statistics of a norm run over its last dimension.
    `norm`: how it works where it is not the family's.
    """

    dims: tuple[str, ...]
    tags: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    role: Literal["", "norm", "query", "query_norm", "router", "buffer"] = ""
    norm: Norm | None = None
    otherwise: Tensor | None = None

    @property
    def is_table(self) -> bool:
        """Whether tokens look its rows up instead of multiplying by it (and the head, which shares its shape)."""
        return "vocab" in self.dims or self.dims[0].startswith("positions")

    def at(self, config: Config, tags: frozenset[str]) -> Tensor | None:
        """The declaration that holds under this config (with defaults) in a layer with these tags."""
        if tags.issuperset(self.tags) and all(holds(config, condition) for condition in self.conditions):
            return self
        return self.otherwise.at(config, tags) if self.otherwise else None


@dataclass(frozen=True)
class Tap:
    """Where to read an activation: the input or output of a module of the stock model, last dimension as `dims`.

    Of a module that returns a tuple (routers: logits first), the first element. `tags` and `conditions` as in Tensor.
    `part` is the number of the one term that is meant where `dims` has a sum.
    """

    module: str
    side: Literal["input", "output"]
    dims: str
    tags: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    part: int = 0


@dataclass(frozen=True)
class Divides:
    """`divisor` (axes multiplied, or a number) must divide axis `axis`; `source` quotes the stock line that says so.

    It holds where the model has units of the axis, and of `beside` if that is named, and under the conditions.
    """

    axis: str
    divisor: str
    source: str
    beside: str = ""
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Least:
    """Axis `axis` must be at least `size` (axes multiplied, or a number); `source` quotes the stock line."""

    axis: str
    size: str
    source: str


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: frequencies depend on the size of `axis`.

    layout: "half" pairs channel j with j + d/2, "interleaved" pairs 2j with 2j + 1. `types` are the rope types whose
    scaling acts on each frequency alone, so that a progression of kept pairs is the same function with another theta;
    `type_default` is the type where the config names none.
    Only the first `fraction` of the channels turns. `theta_key` and `fraction_key` are legacy top-level keys (""
    where there is none; a class without `fraction_key` reads no fraction at all); transformers 5 writes
    rope_parameters.rope_theta and .partial_rotary_factor. `sections` are the layer types that have rope parameters of
    their own, each with the legacy key of its theta and its default; the first also takes legacy rope_scaling.
    """

    axis: str = "head_dim"
    layout: Literal["half", "interleaved"] = "half"
    theta_default: float = 10000.0
    theta_key: str = "rope_theta"
    fraction: float = 1.0
    fraction_key: str = ""
    types: tuple[str, ...] = ("default", "linear", "llama3")
    type_default: str = "default"
    sections: Mapping[str, tuple[str, float]] = field(default_factory=dict)


def without(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The table without names that contain one of `parts`."""
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def unscaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The table of a class whose softmax scale is not carried by its query projections."""
    return {name: replace(tensor, role="") if tensor.role == "query" else tensor for name, tensor in tensors.items()}
