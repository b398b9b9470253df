"""Several token streams as one: one after another, or interleaved by share of train tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minitron_cli.data.tokenise import Encoded
from minitron_cli.runtime.progress import quantity, say


def merge(
    streams: Sequence[Iterator[Encoded]], weights: Sequence[float | None], names: Sequence[str]
) -> Iterator[tuple[int, Encoded]]:
    """(index of the source, document) in the order they are written; weights are all given or all None.

    Without weights every source is read whole, in turn. With weights, which need not sum to 1, see `_by_share`.
    """
    given = [weight for weight in weights if weight is not None]
    if given:
        yield from _by_share(streams, [weight / sum(given) for weight in given], names)
        return
    for index, stream in enumerate(streams):
        for item in stream:
            yield index, item


def _by_share(
    streams: Sequence[Iterator[Encoded]], shares: Sequence[float], names: Sequence[str]
) -> Iterator[tuple[int, Encoded]]:
    """Document by document from the source whose train tokens are furthest behind its share of the total.

    Ends when that source has no more: reading on would break the shares, and repeating documents would train on them
    twice. Validation documents pass by uncounted, so the shares hold for the train split.
    """
    tokens = [0] * len(streams)
    while True:
        total = sum(tokens)
        behind = max(range(len(streams)), key=lambda i: (shares[i] * total - tokens[i], -i))
        item = next(streams[behind], None)
        if item is None:
            if len(streams) > 1:
                say(
                    f"{names[behind]} is used up after {quantity(tokens[behind])} train tokens; the mix ends there, at "
                    f"{quantity(total)} tokens, rather than repeat it."
                )
            return
        if not item.validation:
            tokens[behind] += len(item.ids)
        yield behind, item
