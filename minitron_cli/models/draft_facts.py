"""Facts of a family beside its tensors: defaults, divisibility, the norm's epsilon, rotation, ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_cli.errors import CheckpointError
from minitron_cli.families.schema import Divides, Norm, Rotary, Tensor
from minitron_cli.models.draft_axes import Axes, without_key
from minitron_cli.models.draft_probe import Config, build, saved_tensors, stock_values
from minitron_cli.models.draft_roles import epsilons


def class_defaults(values: Config, axes: Axes, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Field defaults of the stock class under the keys that decide about tensors."""
    keys = dict.fromkeys(each.lstrip("!") for tensor in tensors.values() for each in tensor.conditions)
    # The class's own defaults; where it cannot stand without arguments, this config's values are the best guess.
    try:
        stock = stock_values({"model_type": values["model_type"]})
    except CheckpointError:
        stock = dict(values)
    return {**{key: stock[key] for key in keys if key in stock}, **axes.constants}


def divisibility(values: Config, axes: Axes) -> tuple[Divides, ...]:
    """Rules of divisibility, each with the words in which the stock class refuses a size that breaks it."""
    found = []
    sizes = axes.sizes(values)
    if "kv_heads" in axes.keys:
        found.append(Divides("heads", "kv_heads", "CHECK: the line that repeats keys and values per group of queries"))
    hidden, heads = axes.keys.get("hidden"), axes.keys.get("heads")
    if hidden and heads:
        try:
            build({**values, hidden: sizes["hidden"] // sizes["heads"] * sizes["heads"] + 1})
        except CheckpointError as error:
            words = str(error).partition(": ")[2]
            found.append(Divides("hidden", "heads", f"CHECK: {words}"[:200]))
    return tuple(found)


def with_eps_key(norm: Norm, values: Config) -> Norm:
    """The config key that holds the epsilon the modules have, found by changing it."""
    for key, value in values.items():
        if isinstance(value, float) and "eps" in key and 0.125 in epsilons(build({**values, key: 0.125})):
            absent = without_key(values, key)
            return replace(norm, eps_key=key, eps=absent if isinstance(absent, float) else norm.eps)
    return norm


def rotation(values: Config, axes: Axes, notes: list[str]) -> Rotary | None:
    """Rotary positions, where the model holds frequencies."""
    names = {name: each for name, each in build(values).named_buffers() if name.endswith("inv_freq")}
    if not names:
        return None
    notes.append("rotary: read in the stock class whether rotation pairs halves or neighbours, and its legacy keys")
    turning = 2 * next(iter(names.values())).shape[-1]
    size = axes.sizes(values).get("head_dim", turning)
    if turning != size:
        notes.append(f"rotary: {turning} of {size} channels turn; name the key that says so")
        return Rotary(fraction=turning / size, fraction_key="partial_rotary_factor")
    return Rotary()


def ties(values: Config) -> dict[str, str]:
    """Tensor to the tensor it is tied to where the config ties embeddings, names on disk."""
    if not isinstance(values.get("tie_word_embeddings"), bool):
        return {}
    try:
        model = build({**values, "tie_word_embeddings": True})
        free = build({**values, "tie_word_embeddings": False})
    except CheckpointError:
        return {}
    memory = getattr(model, "all_tied_weights_keys", None) or {}
    on_disk = {id(tensor): name for name, tensor in saved_tensors(free).items()}
    named = {name: on_disk.get(id(tensor), name) for name, tensor in free.state_dict(keep_vars=True).items()}
    return {named.get(copy, copy): named.get(source, source) for copy, source in memory.items()}
