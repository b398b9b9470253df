"""What a shape costs as polynomials of its axes: fast enough to bound whole boxes of a grid.

`Shape` counts tensor by tensor and is the reference. Here the dimensions of all tensors of one layer are multiplied
out once. Every coefficient is positive, so that a sum is smallest and largest where every axis is. Which layers stay
matters where they differ: `Remaining` says it, and fewer of them are always among more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from minitron_cli.families.expression import Axis, Expression, Fixed, Product, Sum, parse
from minitron_cli.families.schema import Family, Tensor
from minitron_cli.prune.sizes import following
from minitron_cli.shape import EXPERTS, Shape

Polynomial = Counter[tuple[str, ...]]
"""Sorted axis names to the coefficient of their product."""

Remaining = Callable[[int], Sequence[int]]
"""How many layers stay to which ones do, in their order; `range` where the last ones leave."""

CHOSEN = "experts per token"
"""Beside the axes: the experts that a token passes."""


@dataclass(frozen=True)
class Cost:
    """A polynomial outside the layers, and one per layer of the original."""

    outside: Polynomial
    layers: tuple[Polynomial, ...]
    remaining: Remaining = range
    _summed: dict[int, list[tuple[int, tuple[str, ...]]]] = field(default_factory=dict)

    def at(self, sizes: Mapping[str, int]) -> int:
        """The cost of the `sizes["layers"]` layers that stay, and of all outside them."""
        count = sizes["layers"]
        terms = self._summed.get(count)
        if terms is None:
            total = self.outside.copy()
            for layer in self.remaining(count) if self.layers else ():
                total.update(self.layers[layer])
            terms = self._summed[count] = [(factor, names) for names, factor in total.items()]
        cost = 0
        for value, names in terms:
            for name in names:
                value *= sizes[name]
            cost += value
        return cost


class Costs:
    """All costs of the cuts of one original, each pinned to a property of `Shape`."""

    def __init__(self, shape: Shape, remaining: Remaining = range) -> None:
        self.shape, self.family, self.remaining = shape, shape.family, remaining
        self._full = self.family.with_defaults(shape.config)
        self._tags = self.family.layer_tags(shape.config, shape["layers"])
        self._products: dict[tuple[str, ...], Polynomial] = {}
        self.quotients = _quotients(self.family)
        """Axes the class computes as a // b: not monotone in b, so bounded apart."""

    @cached_property
    def params(self) -> Cost:
        """`Shape.params`."""
        return self._of_tensors(active=False)

    @cached_property
    def params_non_embedding(self) -> Cost:
        """`Shape.params_non_embedding`."""
        return self._of_tensors(active=False, leave_out=lambda tensor: "vocab" in tensor.dims)

    @cached_property
    def params_active(self) -> Cost:
        """`Shape.params_active`."""
        return self._of_tensors(active=True)

    def kv_elements(self, context: int) -> Cost:
        """`Shape.kv_bytes` of one byte per element."""
        seen = self.shape.seen_tokens(context)
        layers = []
        for tags, tokens in zip(self._tags, seen, strict=True):
            cache, state = (
                _total(self._expanded((text,)) for tag, text in texts.items() if not tag or tag in tags)
                for texts in (self.family.cache, self.family.state)
            )
            layers.append(_total((_scaled(cache, tokens), state)))
        return Cost(Polynomial(), tuple(layers), self.remaining)

    def flops_per_token(self, context: int) -> Cost:
        """`Shape.flops_per_token`."""
        met = self._of_tensors(active=True, leave_out=lambda tensor: tensor.is_table)
        seen = self.shape.seen_tokens(context)
        attention = self._expanded((self.family.attention,)) if context else Polynomial()
        layers = []
        for matrices, tags, tokens in zip(met.layers, self._tags, seen, strict=True):
            has_cache = any(not tag or tag in tags for tag in self.family.cache)
            layers.append(_scaled(_total((matrices, _scaled(attention, tokens if has_cache else 0))), 2))
        return Cost(_scaled(_total((met.outside, self._head())), 2), tuple(layers), self.remaining)

    def _head(self) -> Polynomial:
        """The product with the vocabulary: the largest tensor that has one."""
        found = [tensor for _, tensor, _ in self._declared(active=False) if "vocab" in tensor.dims]
        return max(
            (self._expanded(tensor.dims) for tensor in found),
            key=lambda polynomial: Cost(polynomial, ()).at(self.extended(self.shape.sizes)),
        )

    def extended(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes with the names that only costs know."""
        return {**sizes, CHOSEN: self.family.chosen_experts(self.shape.config, sizes)}

    def bounds(self, low: Mapping[str, int], high: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Sizes below and above those of every point between two corners, which are given as targets of a cut."""
        lower = self.extended(following(self.family, self.shape.sizes, low))
        upper = self.extended(following(self.family, self.shape.sizes, high))
        for name, (over, under) in self.quotients.items():
            lower[name], upper[name] = lower[over] // max(upper[under], 1), upper[over] // max(lower[under], 1)
        return lower, upper

    def _of_tensors(self, *, active: bool, leave_out: Callable[[Tensor], bool] = lambda tensor: False) -> Cost:
        outside = Polynomial()
        layers = [Polynomial() for _ in self._tags]
        for polynomial, tensor, layer in self._declared(active=active):
            if not leave_out(tensor):
                (outside if layer is None else layers[layer]).update(polynomial)
        return Cost(outside, tuple(layers), self.remaining)

    def _declared(self, *, active: bool) -> Iterator[tuple[Polynomial, Tensor, int | None]]:
        """Every declaration that holds, with the elements of its tensors (of all experts, or the chosen ones)."""
        for pattern, tensor in self.family.tensors.items():
            routed = EXPERTS.search(pattern.replace("{expert}", "0"))
            for layer in range(len(self._tags)) if "{layer}" in pattern else (None,):
                here = tensor.at(self._full, frozenset() if layer is None else self._tags[layer])
                if here is None or here.role == "buffer":
                    continue
                dims = here.dims
                if routed and routed[1]:
                    dims = ("experts", *dims)
                polynomial = self._expanded(dims)
                if routed and active:
                    polynomial = _renamed(polynomial, "experts", CHOSEN)
                yield polynomial, here, layer

    def _expanded(self, dims: tuple[str, ...]) -> Polynomial:
        """The product of the dimensions, in axes that the class reads and in quotients that do not cancel."""
        if dims not in self._products:
            product = Polynomial({(): 1})
            for dim in dims:
                product = _times(product, expand(parse(dim)))
            for axis in reversed(self.family.axes):
                if not axis.key and isinstance(axis.default, str):
                    product = _substituted(product, axis.name, axis.default, self.family)
            self._products[dims] = product
        return self._products[dims]


def expand(expression: Expression) -> Polynomial:
    """Multiply out one dimension."""
    match expression:
        case Axis(name):
            return Polynomial({(name,): 1})
        case Fixed(count):
            return Polynomial({(): count})
        case Sum(terms):
            return _total(expand(term) for term in terms)
        case Product(factors):
            product = Polynomial({(): 1})
            for factor in factors:
                product = _times(product, expand(factor))
            return product


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    product = Polynomial()
    for names, factor in left.items():
        for others, coefficient in right.items():
            product[tuple(sorted((*names, *others)))] += factor * coefficient
    return product


def _total(polynomials: Iterable[Polynomial]) -> Polynomial:
    total = Polynomial()
    for polynomial in polynomials:
        total.update(polynomial)
    return total


def _scaled(polynomial: Polynomial, factor: int) -> Polynomial:
    return Polynomial({names: value * factor for names, value in polynomial.items()})


def _renamed(polynomial: Polynomial, old: str, new: str) -> Polynomial:
    return _total(
        Polynomial({tuple(sorted(new if name == old else name for name in names)): factor})
        for names, factor in polynomial.items()
    )


def _substituted(polynomial: Polynomial, name: str, text: str, family: Family) -> Polynomial:
    """Replace a derived axis by its formula; of a quotient a // b, replace b * quotient by a where the class insists.

    `text` is a name, a product, or a quotient of two axes, as all families have them.
    """
    parts = text.split()
    result = Polynomial()
    for names, factor in polynomial.items():
        left = list(names)
        if "//" in parts:
            over, _, under = parts
            while _is_whole(family, over, under, name) and name in left and under in left:
                left.remove(name)
                left.remove(under)
                left.append(over)
        else:
            for _ in range(left.count(name)):
                left.remove(name)
                left += [part for part in parts[::2] if not part.isdigit()]
                factor *= math.prod(int(part) for part in parts[::2] if part.isdigit())
        result[tuple(sorted(left))] += factor
    return result


def _is_whole(family: Family, over: str, under: str, quotient: str) -> bool:
    """Whether the class refuses sizes that do not divide."""
    coupled = family.coupled.get(over) in (f"{under}*{quotient}", f"{quotient}*{under}")
    return coupled or any((rule.axis, rule.divisor) == (over, under) for rule in family.divides)


def _quotients(family: Family) -> dict[str, tuple[str, str]]:
    found = {}
    for axis in family.axes:
        if not axis.key and isinstance(axis.default, str) and "//" in axis.default:
            over, _, under = axis.default.split()
            found[axis.name] = (over, under)
    return found
