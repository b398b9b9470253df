"""Candidate shapes: every point of a grid that meets the budgets and that the stock class accepts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minitron_cli.checkpoint.surgery import new_config
from minitron_cli.errors import InputError, ShapeError
from minitron_cli.runtime.progress import say
from minitron_cli.search.budget import Budget, meet_all
from minitron_cli.search.grid import Grid
from minitron_cli.search.space import Sizes, Space
from minitron_cli.shape import Shape

MOST = 10_000
"""Candidates beyond which a list helps nobody."""


@dataclass(frozen=True)
class Candidate:
    """A feasible shape, and the axes of it that differ from the original."""

    target: Mapping[str, int]
    shape: Shape

    @property
    def name(self) -> str:
        """A name that no other candidate of the same original has."""
        shown = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")
        others = [f"-{axis}{size}" for axis, size in self.target.items() if axis not in shown]
        return self.shape.label() + "".join(others)


def enumerate_candidates(space: Space, budgets: Sequence[Budget]) -> list[Candidate]:
    """All feasible points, most parameters first.

    Raises:
        InputError: there are none, and which budget excludes and what comes nearest; or there are too many.
    """
    found = []
    for target, sizes in _meeting(space, budgets):
        found.append(_candidate(space, target, sizes, budgets))
        if len(found) > MOST:
            raise InputError(
                f"More than {MOST:,} of the grid's {len(space):,} shapes meet the budgets; narrow --grid or a budget, "
                "or add one."
            )
    if not found:
        raise InputError(_explain(space, budgets))
    return sorted(found, key=lambda candidate: (-candidate.shape.params, candidate.name))


def _candidate(space: Space, target: Sizes, sizes: Sizes, budgets: Sequence[Budget]) -> Candidate:
    """The candidate at a point, counted once more, tensor by tensor."""
    original = space.shape
    own = {axis: sizes[axis] for axis in original.sizes}
    layers = list(space.costs.remaining(own["layers"]))
    shape = Shape.of(new_config(original.config, original.family, own, layers))
    for budget in budgets:
        assert budget.count(shape) == budget.cost.at(sizes), f"{shape.label()}: {budget.wording}"
    return Candidate({axis: size for axis, size in target.items() if size != original[axis]}, shape)


def usable_grid(shape: Shape, grid: Grid) -> Grid:
    """The grid without the values of ranges that no rule of the family allows; says which.

    Raises:
        ShapeError: such a value was named, or nothing is left of an axis.
    """
    result = dict(grid)
    space = Space(shape, grid)
    for axis, values in grid.items():
        unusable = {values.entries[position]: reason for position, reason in space.unusable(axis)}
        named = [entry for entry in unusable if entry in values.named]
        if named:
            entry = named[0]
            raise ShapeError(f"--grid {axis}={values.text(entry)} can be in no shape of the grid: {unusable[entry]}.")
        result[axis] = values.without(list(unusable))
        if unusable:
            entry, reason = next(iter(unusable.items()))
            if not result[axis].entries:
                raise ShapeError(f"--grid {axis}: none of its values can be in a shape: {reason}.")
            say(f"--grid {axis}: {len(unusable)} of {len(values.entries)} values are left out; of the first: {reason}.")
    return result


def _explain(space: Space, budgets: Sequence[Budget]) -> str:
    """Why there are no candidates: the first budget that excludes all that meets those before it, and the nearest."""
    for number, budget in enumerate(budgets):
        if not any(True for _ in _meeting(space, budgets[: number + 1])):
            return _exclusion(space, budgets[:number], budget)
    raise AssertionError("called with candidates at hand")


def _exclusion(space: Space, met: Sequence[Budget], budget: Budget) -> str:
    sides = {"below": _nearest(space, met, budget, below=True), "above": _nearest(space, met, budget, below=False)}
    found = [f"{budget.shown(each[0])} ({each[1]}, {side})" for side, each in sides.items() if each]
    if not found:
        return "No point of the grid is a shape that the stock class accepts: its values contradict one another."
    nearest = " and ".join(found)
    if met:
        others = " and ".join(each.option for each in met)
        return (
            f"{budget.option} excludes every shape that meets {others}: none has {budget.asked()}; the nearest has "
            f"{nearest}; relax it or widen --grid."
        )
    if len(space) == 1:
        return (
            f"{budget.option}: {budget.asked()} are asked for, and the one shape of the grid has {nearest}; say "
            "what may shrink, such as --grid auto or --grid ffn=auto."
        )
    return (
        f"{budget.option}: none of the {len(space):,} points of the grid has {budget.asked()}; the nearest has "
        f"{nearest}; relax it or widen --grid."
    )


def _meeting(space: Space, budgets: Sequence[Budget]) -> Iterator[tuple[dict[str, int], Sizes]]:
    return space.points(lambda lower, upper: meet_all(budgets, lower, upper))


def _nearest(space: Space, met: Sequence[Budget], budget: Budget, *, below: bool) -> tuple[float, str] | None:
    """(value, name) of the shape that meets `met` and misses `budget` by the least, on one side."""
    best: list[float] = []

    def wanted(lower: Sizes, upper: Sizes) -> bool:
        if below:
            nearer = budget.value(lower) < budget.low and (not best or budget.value(upper) > best[-1])
        else:
            nearer = budget.value(upper) > budget.high and (not best or budget.value(lower) < best[-1])
        return nearer and meet_all(met, lower, upper)

    nearest = None
    for target, sizes in space.points(wanted, small_first=not below):
        best.append(budget.value(sizes))
        nearest = best[-1], _candidate(space, target, sizes, ()).name
    return nearest


def spread(candidates: Sequence[Candidate], limit: int) -> list[Candidate]:
    """At most `limit` candidates: the largest of each (layers, hidden) first, then the next largest of each."""
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.shape["layers"], candidate.shape["hidden"]), []).append(candidate)
    rounds = itertools.zip_longest(*groups.values())
    return [candidate for each in rounds for candidate in each if candidate is not None][:limit]
