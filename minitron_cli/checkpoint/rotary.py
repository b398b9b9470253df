"""Rotary positions under a cut: which channels may stay together, and what the config must then say.

Frequencies are theta^(-2i/r) over the r channels that turn. Pairs 0, k, 2k, ... of them are the frequencies of a
smaller head under another theta, so only such progressions stay the same function of position. Channels past r never
turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_cli.families.schema import Rotary, lookup

Indices = npt.NDArray[np.int64]


def turning(rotary: Rotary, config: Mapping[str, Any], size: int) -> int:
    """How many of a head's first channels turn."""
    if not rotary.fraction_key:
        return size
    value = lookup(config, "rope_parameters.partial_rotary_factor")
    if value is None:
        value = lookup(config, rotary.fraction_key)
    return int(size * float(rotary.fraction if value is None else value))


def unit_count(rotary: Rotary, config: Mapping[str, Any], size: int) -> int:
    """Units scored along a rotary axis: one per pair that turns, one per channel that does not."""
    turn = turning(rotary, config, size)
    return turn // 2 + size - turn


def per_unit(rotary: Rotary, config: Mapping[str, Any], channels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sum what belongs to each unit: (channels,) to (units,)."""
    turn = turning(rotary, config, len(channels))
    half = rotary.layout == "half"
    pairs = channels[:turn].reshape((2, -1) if half else (-1, 2)).sum(axis=0 if half else 1)
    return np.concatenate([pairs, channels[turn:]])


def pair_channels(turn: int, layout: str, pairs: Indices) -> Indices:
    """Channels of rotary pairs, in the order the stock layout expects: (2 * pairs,)."""
    if layout == "half":
        return np.concatenate([pairs, pairs + turn // 2])
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


def choose(
    rotary: Rotary, config: Mapping[str, Any], scores: npt.NDArray[np.float64], size: int, new_size: int
) -> tuple[int, list[int]]:
    """The progression of pairs with the highest summed score and the best other channels: (step, channel numbers).

    Args:
        scores: (units,), pairs first.
    """
    turn, wanted = turning(rotary, config, size), turning(rotary, config, new_size) // 2
    pairs = turn // 2
    longest = (pairs - 1) // (wanted - 1) if wanted > 1 else 1
    step = max(range(1, longest + 1), key=lambda each: float(scores[:pairs][: wanted * each : each][:wanted].sum()))
    chosen = pair_channels(turn, rotary.layout, np.arange(wanted) * step)
    free = np.argsort(-scores[pairs:], kind="stable")[: new_size - 2 * wanted]
    return step, np.concatenate([chosen, turn + np.sort(free)]).tolist()


def rope_types(rotary: Rotary, config: Mapping[str, Any]) -> set[str]:
    """The rope scaling types a config names, under old or new keys."""
    entries = [config.get("rope_scaling"), config.get("rope_parameters")]
    entries += [lookup(config, f"rope_parameters.{section}") for section in rotary.sections]
    found = {
        str(entry.get("rope_type") or entry.get("type") or "default") for entry in entries if isinstance(entry, Mapping)
    }
    return found or {rotary.type_default}


def retuned(config: Mapping[str, Any], rotary: Rotary, size: int, new_size: int, step: int) -> dict[str, Any]:
    """The config keys that change so that the kept pairs keep their frequencies: theta' = theta^(step * r'/r).

    A value of None means that the key must go.
    """
    turn = turning(rotary, config, size)
    exponent = step * turning(rotary, config, new_size) / turn
    given = config.get("rope_parameters")
    parameters: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if not rotary.sections:
        old = parameters.get("rope_theta") or config.get(rotary.theta_key) or rotary.theta_default
        theta = float(old) ** exponent
        return {"rope_parameters": {**parameters, "rope_theta": theta}} if parameters else {rotary.theta_key: theta}
    # Written in the new spelling: the stock classes read legacy keys for some sections only.
    nested: dict[str, Any] = {}
    for number, (section, (key, default)) in enumerate(rotary.sections.items()):
        entry = dict(parameters.get(section) or {"rope_type": "default"})
        if number == 0 and isinstance(config.get("rope_scaling"), Mapping):
            entry.update(config["rope_scaling"])
        entry["rope_theta"] = float(entry.get("rope_theta") or config.get(key) or default) ** exponent
        nested[section] = entry
    legacy = {"rope_scaling", *(key for key, _ in rotary.sections.values())} & config.keys()
    return {"rope_parameters": nested, **dict.fromkeys(legacy)}
