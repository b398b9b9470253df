"""From observed sizes to axis expressions: the smallest sum of products that every change leaves true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

MOST_FACTORS = 4
MOST_TERMS = 3
"""Distinct products in one sum, a constant not counted."""

OUTER_WORDS = ("expert", "group", "head")
"""Axes whose names hold these words enclose others: an expert has channels, a head has channels."""


@dataclass(frozen=True, order=True)
class Term:
    """`count` times the product of `factors`; no factors: a constant."""

    factors: tuple[str, ...]
    count: int


def moving_axes(targets: Sequence[int], sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """Axes that can be part of a dimension: no change of theirs alone left it as it was.

    The first of `targets` and `sizes` is the base.
    """
    base = sizes[0]
    found = []
    for axis in base:
        moved = [target != targets[0] for target, each in zip(targets, sizes, strict=True) if each[axis] != base[axis]]
        if moved and all(moved):
            found.append(axis)
    return found


def fit(targets: Sequence[int], sizes: Sequence[Mapping[str, int]]) -> list[tuple[Term, ...]]:
    """All sums of products that reproduce `targets` at the smallest complexity; empty where none does."""
    if len(set(targets)) == 1:
        return [(Term((), targets[0]),)]
    products = _products(targets, sizes)
    best: list[tuple[Term, ...]] = []
    least = (MOST_TERMS + 2, 0)
    for chosen in _choices(products):
        weight = (len(chosen), sum(map(len, chosen)))
        if weight > least:
            break
        solved = _solve(targets, [products[factors] for factors in chosen])
        if solved is not None:
            least = weight
            best.append(tuple(Term(factors, count) for factors, count in zip(chosen, solved, strict=True)))
    return best


def _products(targets: Sequence[int], sizes: Sequence[Mapping[str, int]]) -> dict[tuple[str, ...], list[int]]:
    """Every product of axes that fits into the dimension, with its sizes; the empty one is the constant 1."""
    axes = moving_axes(targets, sizes)
    found = {}
    for degree in range(min(len(axes), MOST_FACTORS) + 1):
        for factors in combinations(axes, degree):
            values = [_product(factors, each) for each in sizes]
            if all(value <= target for value, target in zip(values, targets, strict=True)):
                found[factors] = values
    return found


def _product(factors: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    total = 1
    for factor in factors:
        total *= sizes[factor]
    return total


def _choices(products: Mapping[tuple[str, ...], list[int]]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Sets of products, few and short first; more products than can be searched are tried in pairs only."""
    most = MOST_TERMS if len(products) <= 24 else 2
    for count in range(1, most + 2):
        sets = [each for each in combinations(products, count) if count <= most or () in each]
        yield from sorted(sets, key=lambda each: sum(map(len, each)))


def _solve(targets: Sequence[int], columns: list[list[int]]) -> list[int] | None:
    """Positive whole coefficients that reproduce the targets exactly."""
    matrix = np.array(columns, dtype=np.float64).T
    if np.linalg.matrix_rank(matrix) < len(columns):
        return None
    counts = np.linalg.lstsq(matrix, np.array(targets, dtype=np.float64), rcond=None)[0].round().astype(int).tolist()
    if min(counts) < 1:
        return None
    exact = all(
        sum(count * column[row] for count, column in zip(counts, columns, strict=True)) == target
        for row, target in enumerate(targets)
    )
    return list(counts) if exact else None


@cache
def nesting(axis: str) -> int:
    """Rank of an axis in a product: outermost first."""
    if axis == "group":  # query heads within a KV head
        return 3
    for rank, word in enumerate(OUTER_WORDS):
        if word in axis and not axis.endswith(("dim", "ffn")):
            return rank
    return len(OUTER_WORDS) + 1


def product_text(factors: Sequence[str]) -> str:
    """`kv_heads*head_dim`: outer axes first."""
    return "*".join(sorted(factors, key=nesting))
