"""The points of a grid, walked box by box: a box that no budget-meeting shape can be in is left without a look inside.

A box is a range of values per axis. The sizes at its two corners bound every cost of its points (`cost.Costs.bounds`);
a box that passes is halved along its longest axis until it is a point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from minitron_cli.errors import ShapeError
from minitron_cli.families.expression import axes, parse
from minitron_cli.prune.sizes import complete_target, following
from minitron_cli.search.cost import Costs, Remaining
from minitron_cli.search.grid import Grid
from minitron_cli.shape import Shape

Sizes = Mapping[str, int]
Box = tuple[tuple[int, int], ...]
"""First and last position in the values of each axis, inclusive."""

MOST_TRIES = 20_000
"""Combinations tried before a value counts as usable."""


class Space:
    """A grid over one original."""

    def __init__(self, shape: Shape, grid: Grid, remaining: Remaining = range) -> None:
        self.shape, self.grid, self.costs = shape, grid, Costs(shape, remaining)
        self._axes = list(grid)
        self._ratios = [[(entry.numerator, entry.denominator) for entry in values.entries] for values in grid.values()]
        self._factors = [number for number, values in enumerate(grid.values()) if values.factors]

    def __len__(self) -> int:
        total = 1
        for values in self.grid.values():
            total *= len(values.entries)
        return total

    def points(
        self, wanted: Callable[[Sizes, Sizes], bool], *, small_first: bool = False
    ) -> Iterator[tuple[dict[str, int], Sizes]]:
        """(target, sizes) of every valid point whose box and whose own sizes are wanted.

        Args:
            wanted: is given sizes below and above all points of a box; at a point, the point's own sizes twice. It may
                become stricter while points are taken.
            small_first: which end of a box comes first.
        """
        stack: list[Box] = [tuple((0, len(ratios) - 1) for ratios in self._ratios)]
        while stack:
            box = stack.pop()
            low, high = self._corners(box)
            if not wanted(*self.costs.bounds(low, high)):
                continue
            longest = max(range(len(box)), key=lambda number: box[number][1] - box[number][0], default=0)
            first, last = box[longest] if box else (0, 0)
            if first < last:
                middle = (first + last) // 2
                halves = [(first, middle), (middle + 1, last)]
                for half in reversed(halves) if small_first else halves:
                    stack.append((*box[:longest], half, *box[longest + 1 :]))
                continue
            sizes = self.sizes_at(low) if self._is_whole(box, low) else None
            if sizes is not None:
                yield low, self.costs.extended(sizes)

    def sizes_at(self, target: Mapping[str, int]) -> dict[str, int] | None:
        """Sizes of every axis at a point; None where a rule of the stock class excludes it."""
        try:
            return complete_target(self.shape, target)
        except ShapeError:
            return None

    def _corners(self, box: Box) -> tuple[dict[str, int], dict[str, int]]:
        """The targets with the smallest and the largest values; factors are rounded down, so that both are bounds."""
        low, high = {}, {}
        for axis, ratios, (first, last) in zip(self._axes, self._ratios, box, strict=True):
            low[axis], high[axis] = ratios[first][0], ratios[last][0]
        if self._factors:
            hiddens = [self._hidden(corner) for corner in (low, high)]
            for number in self._factors:
                for corner, hidden, position in zip((low, high), hiddens, box[number], strict=True):
                    numerator, denominator = self._ratios[number][position]
                    corner[self._axes[number]] = max(hidden * numerator // denominator, 1)
        return low, high

    def _hidden(self, target: Mapping[str, int]) -> int:
        factors = {self._axes[number] for number in self._factors}
        sized = {axis: value for axis, value in target.items() if axis not in factors}
        return following(self.shape.family, self.shape.sizes, sized)["hidden"]

    def _is_whole(self, box: Box, target: Mapping[str, int]) -> bool:
        """Whether every factor times hidden is a whole number at this point."""
        if not self._factors:
            return True
        hidden = self._hidden(target)
        return all(hidden % self._ratios[number][box[number][0]][1] == 0 for number in self._factors)

    def unusable(self, axis: str) -> Iterator[tuple[int, str]]:
        """(position, reason) of every value of an axis that no other values of the grid make valid."""
        bound = [name for name in self._axes if name != axis and name in self._bound_axes()]
        numbers = [self._axes.index(name) for name in bound]
        own = self._axes.index(axis)
        for position in range(len(self._ratios[own])):
            reason = ""
            others = itertools.product(*(reversed(range(len(self._ratios[number]))) for number in numbers))
            for tried, positions in enumerate(others):
                chosen = {own: position, **dict(zip(numbers, positions, strict=True))}
                found = self._reason(chosen)
                reason = reason or found
                if not found or tried == MOST_TRIES:
                    break
            else:
                yield position, reason

    def _reason(self, chosen: Mapping[int, int]) -> str:
        """Why the values at these positions, all other axes as in the original, make no shape; "" where they do."""
        target = {self._axes[n]: self._ratios[n][p][0] for n, p in chosen.items() if n not in self._factors}
        hidden = self._hidden(target)
        for number in self._factors:
            if number in chosen:
                numerator, denominator = self._ratios[number][chosen[number]]
                if hidden * numerator % denominator:
                    return f"hidden {hidden} times {numerator / denominator:g} is not a whole number"
                target[self._axes[number]] = hidden * numerator // denominator
        try:
            complete_target(self.shape, target)
        except ShapeError as error:
            return str(error).rstrip(".")
        return ""

    def _bound_axes(self) -> frozenset[str]:
        """Axes that any rule of the family speaks of, and hidden where factors multiply it."""
        family = self.shape.family
        texts = [rule.divisor for rule in family.divides] + list(family.coupled.values())
        names = {name for text in texts for name in axes(parse(text))}
        names |= {rule.axis for rule in family.divides} | set(family.coupled) | {"heads", "kv_heads"}
        names |= {name for quotient in self.costs.quotients.values() for name in quotient}
        return frozenset(names | ({"hidden"} if self._factors else set()))
