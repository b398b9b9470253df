"""What a cut of hidden channels does to the residual stream: factors for its norms, and whether it can be rotated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from minitron_cli.config.prune import Rescale, Rotate
from minitron_cli.errors import FamilyError, InputError
from minitron_cli.importance.layout import DIRECTIONS, ENERGY, Scores
from minitron_cli.importance.residual import stream_norms, unrotatable
from minitron_cli.shape import Shape


def rescaling(
    shape: Shape, scores: Scores, layers: Collection[int], kept: Sequence[int] | None, how: Rescale, *, rotated: bool,
    untied: bool,
) -> dict[str, float]:  # fmt: skip
    """Factors that keep the size of what norms put out when only some channels are left, by tensor.

    A norm divides by the root mean square over d channels, then over the d' that stay: what it puts out grows by
    sqrt(d' E / (d E')), E and E' being the energies of all and of the kept channels. Embeddings that the stock class
    multiplies by sqrt(d) are multiplied by sqrt(d / d'); where they are the head too, the norm before it takes that
    back.

    Args:
        kept: the hidden channels that stay (directions, where `rotated`); None: all.

    Raises:
        InputError: measured energies are asked for and were not gathered.
    """
    if kept is None or how == "off" or (how == "auto" and not rotated):
        return {}
    before, after = shape["hidden"], len(kept)
    names = [(name, layer) for name, _, layer in stream_norms(shape) if layer is None or layer in layers]
    measured = all(ENERGY + name in scores for name, _ in names)
    if how != "analytic" and not measured:
        raise InputError(
            "There are no energies of the residual stream to rescale by; run `minitron importance` and give its result "
            "with --importance, or use --rescale analytic."
        )
    factors: dict[str, float] = {}
    for name, _ in names:
        share = 1.0
        if how != "analytic":
            energies = scores[DIRECTIONS if rotated else ENERGY + name]
            share = float(energies[list(kept)].sum() / energies.sum())
        factors[name] = math.sqrt(before * share / after)
    if shape.family.embed_scale == "hidden":
        growth = math.sqrt(before / after)
        if tied_head(shape) is not None and not untied:
            factors |= {name: factors[name] / growth for name, layer in names if layer is None}
        tables = [name for name, tensor in shape.family.tensors.items() if tensor.dims == ("vocab", "hidden")]
        factors |= {name: growth for name in tables if name not in shape.family.tied}
    return factors


def tied_head(shape: Shape) -> str | None:
    """The head's weight where it is the embedding table; None where it is a matrix of its own."""
    present = {name for name, _, _ in shape.family.expected(shape.config)}
    return next((name for name in shape.family.tied if name not in present), None)


def untying(shape: Shape) -> dict[str, Any]:
    """What config.json must say so that a tied head is a matrix of its own; nothing where it already is."""
    head = tied_head(shape)
    if head is None:
        return {}
    conditions = shape.family.tensors[head].conditions
    return {condition[1:]: False for condition in conditions if condition.startswith("!")}


def require_readers(shape: Shape) -> None:
    """Insist on a residual stream that a rotation leaves the same function.

    Raises:
        FamilyError: it is not.
    """
    why = unrotatable(shape)
    if why:
        raise FamilyError(f"{shape.family.name} cannot be rotated: {why}; leave out --rotate on.")


def rotates(shape: Shape, scores: Scores, how: Rotate, hidden: int) -> bool:
    """Whether a cut to this hidden size turns the residual stream.

    Raises:
        FamilyError, InputError: it is asked for and cannot be done.
    """
    if how == "on":
        require_rotatable(shape, scores)
    possible = hidden < shape["hidden"] and DIRECTIONS in scores and not unrotatable(shape)
    return how == "on" or (how == "auto" and possible)


def require_rotatable(shape: Shape, scores: Scores) -> None:
    """Insist on directions to rotate to, too.

    Raises:
        FamilyError: the family cannot be rotated.
        InputError: the directions were not collected.
    """
    require_readers(shape)
    if DIRECTIONS not in scores:
        raise InputError(
            "There are no directions of the residual stream to rotate to; run `minitron importance` with --collect "
            "directions, and give its result with --importance, or leave out --rotate on."
        )
