"""Axis expressions: parsing, measuring, and the mistakes a family file can make."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_cli.families.expression import Axis, Expression, Fixed, Product, Sum, axes, parse, size

SIZES = {"a": 2, "b": 3, "ab": 5, "c_1": 7}


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("a", Axis("a")),
        ("  12 ", Fixed(12)),
        ("a*b", Product((Axis("a"), Axis("b")))),
        ("a + b", Sum((Axis("a"), Axis("b")))),
        ("a + b*c_1", Sum((Axis("a"), Product((Axis("b"), Axis("c_1")))))),
        ("a*(b + b)", Product((Axis("a"), Sum((Axis("b"), Axis("b")))))),
        ("((a))", Axis("a")),
    ],
)
def test_parse(text: str, expression: Expression) -> None:
    assert parse(text) == expression


def test_interleaving_and_concatenation_differ_though_their_sizes_agree() -> None:
    assert parse("a*2") != parse("2*a") != parse("a + a")
    assert {size(parse(text), SIZES) for text in ("a*2", "2*a", "a + a")} == {4}


@pytest.mark.parametrize("text", ["", " ", "a b", "a +", "+ a", "a**b", "a*(b", "a)", "(a", "()", "a - b", "1a", "a,b"])
def test_malformed_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="axis expression"):
        parse(text)


def test_an_unknown_axis_has_no_size() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        size(parse("a*nowhere"), SIZES)


_LEAVES = st.sampled_from(sorted(SIZES)) | st.integers(0, 9).map(str)
_TEXTS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "(" + " + ".join(parts) + ")"),
        st.lists(inner, min_size=2, max_size=3).map("*".join),
    ),
    max_leaves=8,
)


@given(_TEXTS)
def test_the_size_is_what_python_computes(text: str) -> None:
    assert size(parse(text), SIZES) == eval(text, {}, dict(SIZES))


@given(_TEXTS)
def test_axes_are_the_names_in_the_text(text: str) -> None:
    words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()
    assert axes(parse(text)) == SIZES.keys() & set(words)


@given(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=5))
def test_products_multiply_and_sums_add(names: list[str]) -> None:
    assert size(parse("*".join(names)), SIZES) == math.prod(SIZES[name] for name in names)
    assert size(parse("+".join(names)), SIZES) == sum(SIZES[name] for name in names)
