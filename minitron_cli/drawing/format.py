"""Numbers as people write them."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"
"""What a table shows where nothing was measured."""


def number(value: Any) -> float | None:
    """A finite number from a file, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: Any) -> str:
    """`1,443,456`."""
    found = number(value)
    return NONE if found is None else f"{found:,.0f}"


def fixed(value: Any, digits: int = 3) -> str:
    """`2.031`, with separators from a thousand up."""
    found = number(value)
    return NONE if found is None else f"{found:,.{digits}f}".replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    """`+0.271`, `−0.012`; zero has no sign."""
    found = number(value)
    if found is None:
        return NONE
    text = f"{found:+,.{digits}f}"
    return text[1:] if not float(text.replace(",", "")) else text.replace("-", "−")


def percent(part: Any, whole: Any, digits: int = 1) -> str:
    """`49.6 %` of a whole."""
    top, bottom = number(part), number(whole)
    return NONE if top is None or not bottom else f"{100 * top / bottom:.{digits}f} %"


def ratio(value: Any) -> str:
    """A perplexity: two decimals, fewer when it is large."""
    found = number(value)
    if found is None:
        return NONE
    return f"{found:,.2f}" if found < 1000 else f"{found:,.0f}"


def moment(text: Any) -> str:
    """`2026-11-23T20:44:32+0000` as `2026-11-23 20:44:32 +0000`."""
    return f"{text[:10]} {text[11:19]} {text[19:]}".strip() if isinstance(text, str) else NONE


def scaled(value: float, step: float) -> str:
    """A tick of an axis of counts: `250k`, `1.25M`; as many decimals as `step` needs to tell neighbours apart."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.{decimals(step / unit)}f}{suffix}"
    return f"{value:.{decimals(step)}f}"


def decimals(step: float) -> int:
    """Decimals that show multiples of `step` exactly, at most 6."""
    for digits in range(6):
        if abs(round(step, digits) - step) < 1e-9 * max(abs(step), 1e-12) * 1e3:
            return digits
    return 6
