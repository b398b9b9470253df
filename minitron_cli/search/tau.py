"""How far two orders agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of paired values: 1 for the same order, -1 for the reverse; None where one has no order.

    (concordant - discordant) / sqrt(pairs untied in the first * pairs untied in the second), by counting all pairs.
    """
    agreement = untied_first = untied_second = 0
    for (a, b), (c, d) in combinations(zip(first, second, strict=True), 2):
        one, other = (a > c) - (a < c), (b > d) - (b < d)
        agreement += one * other
        untied_first += one != 0
        untied_second += other != 0
    if not untied_first or not untied_second:
        return None
    return agreement / math.sqrt(untied_first * untied_second)
