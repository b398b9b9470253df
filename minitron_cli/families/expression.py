"""Axis expressions: what one dimension of a tensor is made of.

    "hidden"                                                   one axis
    "kv_heads*group*head_dim"                                  a product: row-major nesting, outermost first
    "kv_heads*group*head_dim + kv_heads*head_dim"              a sum: concatenation
    "heads*(head_dim + head_dim + head_dim)"                   nested freely (interleaved per head)
    "2*ffn" and "ffn*2"                                        two blocks of ffn; ffn pairs, interleaved

Numbers are structure that is never cut. This module only parses and measures; `checkpoint.surgery` cuts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Axis:
    """A named axis."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """A constant number of positions."""

    size: int


@dataclass(frozen=True)
class Product:
    """Row-major nesting: the first factor is the outermost."""

    factors: tuple[Expression, ...]


@dataclass(frozen=True)
class Sum:
    """Concatenation."""

    terms: tuple[Expression, ...]


Expression = Axis | Fixed | Product | Sum

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z_0-9]*)|(\d+)|([*+()]))")


@cache
def parse(text: str) -> Expression:
    """Parse one axis expression.

    Raises:
        ValueError: the text is not an expression (a mistake in a family file, so not a user error).
    """
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise ValueError(f"bad axis expression {text!r} at {stripped[position:]!r}")
        tokens.append(match.group().strip())
        position = match.end()
    expression, rest = _sum(tokens)
    if rest:
        raise ValueError(f"bad axis expression {text!r} at {''.join(rest)!r}")
    return expression


def _sum(tokens: list[str]) -> tuple[Expression, list[str]]:
    terms: list[Expression] = []
    while True:
        term, tokens = _product(tokens)
        terms.append(term)
        if not tokens or tokens[0] != "+":
            return (terms[0] if len(terms) == 1 else Sum(tuple(terms))), tokens
        tokens = tokens[1:]


def _product(tokens: list[str]) -> tuple[Expression, list[str]]:
    factors: list[Expression] = []
    while True:
        factor, tokens = _atom(tokens)
        factors.append(factor)
        if not tokens or tokens[0] != "*":
            return (factors[0] if len(factors) == 1 else Product(tuple(factors))), tokens
        tokens = tokens[1:]


def _atom(tokens: list[str]) -> tuple[Expression, list[str]]:
    if not tokens or tokens[0] in "*+)":
        raise ValueError(f"axis expression ends or breaks at {tokens[:1]}")
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        inner, rest = _sum(rest)
        if not rest or rest[0] != ")":
            raise ValueError("axis expression lacks a closing parenthesis")
        return inner, rest[1:]
    return (Fixed(int(head)) if head.isdigit() else Axis(head)), rest


def size(expression: Expression, sizes: Mapping[str, int]) -> int:
    """Number of positions of the dimension, given the size of every axis."""
    match expression:
        case Axis(name):
            return sizes[name]
        case Fixed(count):
            return count
        case Product(factors):
            total = 1
            for factor in factors:
                total *= size(factor, sizes)
            return total
        case Sum(terms):
            return sum(size(term, sizes) for term in terms)


def axes(expression: Expression) -> frozenset[str]:
    """Names of all axes in the expression."""
    match expression:
        case Axis(name):
            return frozenset((name,))
        case Fixed():
            return frozenset()
        case Product(parts) | Sum(parts):
            return frozenset().union(*(axes(part) for part in parts))
