"""Which layers' states a student is drawn towards, as data: `last-2:last-2`, `29:13,31:15`."""

from __future__ import annotations

import re

from minitron_cli.errors import ConfigError

Pair = tuple[str, str]
"""A teacher's layer and a student's, as written: `13`, `last` or `last-2`."""


def parse_layers_map(spec: str) -> tuple[Pair, ...]:
    """Read `TEACHER:STUDENT,TEACHER:STUDENT,...`.

    Raises:
        ConfigError: a part is no pair of layers, or written twice.
    """
    pairs: list[Pair] = []
    for part in (each.strip() for each in spec.split(",")):
        match = re.fullmatch(r"(\d+|last(?:-\d+)?):(\d+|last(?:-\d+)?)", part)
        if match is None:
            raise ConfigError(f"'{part}' is not TEACHER:STUDENT, for example last-2:last-2 or 29:13,31:15.")
        pair = (match[1], match[2])
        if pair in pairs:
            raise ConfigError(f"{part} is written twice.")
        pairs.append(pair)
    return tuple(pairs)


def layer_pairs(spec: str, teacher_layers: int, student_layers: int) -> tuple[tuple[int, int], ...]:
    """Layer numbers (teacher's, student's), from 0, of two models with that many layers.

    Raises:
        ConfigError: a layer does not exist, or two spellings mean the same pair.
    """
    found: list[tuple[int, int]] = []
    for pair in parse_layers_map(spec):
        numbers = tuple(map(_number, pair, (teacher_layers, student_layers)))
        for whose, text, number, layers in zip(
            ("teacher", "student"), pair, numbers, (teacher_layers, student_layers), strict=True
        ):
            if not 0 <= number < layers:
                raise ConfigError(f"--layers-map: the {whose} has layers 0 to {layers - 1}, and no layer {text}.")
        if (numbers[0], numbers[1]) in found:
            raise ConfigError(f"--layers-map: {pair[0]}:{pair[1]} is layer {numbers[0]}:{numbers[1]}, mapped twice.")
        found.append((numbers[0], numbers[1]))
    return tuple(found)


def _number(text: str, layers: int) -> int:
    """A layer's number; outside 0 to layers - 1 where there is none."""
    if text.isdigit():
        return int(text)
    return layers - 1 - int(text.removeprefix("last").removeprefix("-") or 0)
