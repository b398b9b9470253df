"""Target sizes, completed and checked against the family's rules before any unit is chosen."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_cli.checkpoint.rotary import rope_types, turning
from minitron_cli.errors import ShapeError
from minitron_cli.families.expression import axes, parse, size
from minitron_cli.families.schema import Axis, Family, formula
from minitron_cli.shape import Shape


def complete_target(shape: Shape, target: Mapping[str, int]) -> dict[str, int]:
    """New sizes of every axis, derived ones included, checked against the family's rules.

    A smaller `kv_heads` alone takes its query heads along.

    Raises:
        ShapeError: a size grows, may not be cut, or breaks a divisibility rule of the stock class.
    """
    family, old = shape.family, dict(shape.sizes)
    if family.draft:
        raise ShapeError(f"{family.name} can be inspected but not pruned yet; its cuts are not proven.")
    for name, value in target.items():
        axis = family.axis(name)
        if name in shape.absent:
            raise ShapeError(f"--{name.replace('_', '-')}: no layer of this {family.name} model has any.")
        if not axis.prunable and value != old[name]:
            raise ShapeError(f"--{name.replace('_', '-')}: {family.name} cannot cut it ({_why_not(axis)}).")
        if value > old[name]:
            raise ShapeError(
                f"--{name.replace('_', '-')} {value} is larger than the original {old[name]}; pruning only removes."
            )
        if value < 1:
            raise ShapeError(f"--{name.replace('_', '-')} must be at least 1.")
    sizes = following(family, old, target)
    check_rules(shape, sizes)
    check_rotation(shape, sizes)
    for member, (over, under) in members(family).items():
        if sizes[member] > old[member]:
            most, option = sizes[under] * old[member], over.replace("_", "-")
            raise ShapeError(
                f"{over} {sizes[over]} on {under} {sizes[under]} make {sizes[member]} per group; the original has "
                f"{old[member]}; give --{option} {most} or fewer."
            )
    for axis in family.axes:
        if axis.why_not and axis.name not in family.coupled and sizes[axis.name] != old[axis.name]:
            raise ShapeError(
                f"{axis.name} would change from {old[axis.name]} to {sizes[axis.name]}, which {family.name} cannot cut "
                f"({axis.why_not})."
            )
    for name, value in sizes.items():
        if value != target.get(name, value):
            raise ShapeError(f"{family.name} computes {name} {value} from the other sizes, not {target[name]}.")
        if value > old[name] and not family.axis(name).follows:
            raise ShapeError(f"{name} would grow from {old[name]} to {value}: the stock class computes it; cut more.")
    return sizes


def following(family: Family, old: Mapping[str, int], target: Mapping[str, int]) -> dict[str, int]:
    """The target with what follows from it: query heads of removed KV heads, coupled and derived axes."""
    sizes = {**old, **target}
    for member, (over, under) in members(family).items():
        if under in target and over not in target:
            sizes[over] = target[under] * old[member]
    for axis in family.axes:
        # A name for another axis: every query head of these classes is a KV head.
        if axis.prunable and not axis.key and axis.default in old and axis.name in target:
            sizes[str(axis.default)] = target.get(str(axis.default), target[axis.name])
    changed = {name for name in sizes if sizes[name] != old[name]}
    for name, expression in family.coupled.items():
        if name not in target and changed & axes(parse(expression)):
            sizes[name] = size(parse(expression), sizes)
            changed.add(name)
    # The other way round: a head_dim that the class computes from hidden needs no coupling, only its formula.
    for axis in family.axes:
        if not axis.key and isinstance(axis.default, str):
            sizes[axis.name] = formula(axis.default, sizes)
        elif axis.follows:
            sizes[axis.name] = formula(axis.follows, sizes)
    return sizes


def members(family: Family) -> dict[str, tuple[str, str]]:
    """Axes whose units lie inside those of another (query heads of a KV head): member to (all of them, the outer axis).

    Cutting the outer axis takes its members along.
    """
    found = {}
    for axis in family.axes:
        if isinstance(axis.default, str) and "//" in axis.default and axis.within:
            over, _, under = axis.default.split()
            if under == axis.within:
                found[axis.name] = (over, under)
    return found


def _why_not(axis: Axis) -> str:
    return axis.why_not or f"the stock class computes it as {axis.default}"


def check_rules(shape: Shape, sizes: Mapping[str, int]) -> None:
    """Divisibility rules and smallest sizes of the stock class, and coupled axes.

    Raises:
        ShapeError: with the rule's source.
    """
    family = shape.family
    for rule in shape.rules:
        divisor = size(parse(rule.divisor), sizes)
        if divisor and sizes[rule.axis] % divisor:
            raise ShapeError(
                f"{rule.axis} {sizes[rule.axis]} is not a multiple of "
                f"{'' if rule.divisor.isdigit() else rule.divisor + ' '}{divisor}, and the stock class refuses that "
                f"({rule.source})."
            )
    for least in family.least:
        smallest = size(parse(least.size), sizes)
        if 0 < sizes[least.axis] < smallest:
            raise ShapeError(
                f"{least.axis} {sizes[least.axis]} is too few: the stock class needs {smallest} ({least.source})."
            )
    for axis, expression in family.coupled.items():
        if sizes[axis] != size(parse(expression), sizes):
            raise ShapeError(f"{family.name} computes {axis} = {expression}; cut both so that they agree.")


def check_rotation(shape: Shape, sizes: Mapping[str, int]) -> None:
    """A cut rotary axis: channels turn in pairs, and the rope type must allow another size.

    Raises:
        ShapeError: otherwise.
    """
    rotary = shape.family.rotary
    if rotary is None or sizes[rotary.axis] == shape.sizes[rotary.axis]:
        return
    turn = turning(rotary, shape.config, sizes[rotary.axis])
    if turn % 2 or not turn:
        raise ShapeError(f"{rotary.axis} {sizes[rotary.axis]}: {turn} channels would turn, and they turn in pairs.")
    bad = rope_types(rotary, shape.config) - set(rotary.types)
    if bad:
        raise ShapeError(
            f"{rotary.axis} cannot be cut under rope type '{min(bad)}': its frequencies depend on {rotary.axis} itself."
        )
