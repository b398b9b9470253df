"""Read what users write for sizes: budgets, windows, grids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from minitron_cli.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_params(text: str, total: int) -> int:
    """`4B`, `350M`, `1_000_000`, `7.8e9` or `50%` of `total`, in parameters.

    Raises:
        ConfigError: not a positive size.
    """
    clean = text.strip().replace("_", "").replace(",", "")
    if clean.endswith("%"):
        value = _number(clean[:-1], text) / 100 * total
    else:
        unit = clean[-1:] if clean[-1:] in _UNITS and clean[-1:] else ""
        value = _number(clean.removesuffix(unit) if unit else clean, text) * _UNITS[unit]
    if value <= 0:
        raise ConfigError(f"{text!r} is not a positive size; write 4B, 350M or 50%.")
    return round(value)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{whole!r} is not a size; write 4B, 350M or 50%.") from None


def window(params: str | None, tolerance: str, params_range: str | None, total: int) -> tuple[int, int]:
    """The parameter window, bounds inclusive.

    Raises:
        ConfigError: a part cannot be read, or the window is empty.
    """
    if params_range is not None:
        low_text, colon, high_text = params_range.partition(":")
        if not colon:
            raise ConfigError(f"--params-range {params_range}: write LO:HI, such as 7.8B:8.5B or 45%:50%.")
        low, high = read_params(low_text, total), read_params(high_text, total)
    else:
        assert params is not None
        target = read_params(params, total)
        share = tolerance.strip()
        spread = float(_number(share[:-1], tolerance)) / 100 if share.endswith("%") else _number(share, tolerance)
        low, high = round(target * (1 - spread)), round(target * (1 + spread))
    if low > high:
        raise ConfigError(f"The parameter window {low:,} to {high:,} is empty; swap the bounds.")
    return low, high


def read_grid(entries: Sequence[str], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """`axis=values`: comma lists, `lo..hi`, and `lo..hi/step`.

    Raises:
        ConfigError: an unknown axis or an unreadable value.
    """
    grid: dict[str, list[int]] = {}
    for entry in entries:
        axis, equals, values = entry.partition("=")
        axis = axis.strip().replace("-", "_")
        if not equals or axis not in sizes:
            raise ConfigError(f"--grid {entry}: write axis=values with axis one of {', '.join(sizes)}.")
        found: list[int] = []
        for part in values.split(","):
            found += _values(part.strip(), entry)
        grid[axis] = sorted(set(found), reverse=True)
    return grid


def _values(part: str, entry: str) -> list[int]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)(?:/(\d+))?", part)
    if span:
        low, high, step = int(span[1]), int(span[2]), int(span[3] or 1)
        if step < 1 or low > high:
            raise ConfigError(f"--grid {entry}: the range {part} is empty.")
        return list(range(low, high + 1, step))
    if re.fullmatch(r"\d+", part) and int(part) > 0:
        return [int(part)]
    raise ConfigError(f"--grid {entry}: {part!r} is not a size or a range such as 29..32.")
