"""How far models with removed layers are from the whole one, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from minitron_cli.evaluate.perplexity import CHUNK_ELEMENTS
from minitron_cli.models.head import Head
from minitron_cli.models.layerwise import LayerwiseModel


class _Ending:
    """The states that go into the head at chosen positions, (tokens, hidden), and the head."""

    def __init__(self, model: LayerwiseModel, hidden: Tensor, chosen: Tensor) -> None:
        output = model.leave(hidden)
        self.head = Head(model.model, output)
        self.states: Tensor = output.last_hidden_state[:, :-1][chosen]

    def log_probs(self, tokens: slice) -> Tensor:
        """(tokens, vocab) in fp32."""
        return self.head(self.states[tokens]).log_softmax(-1)


def compare(
    model: LayerwiseModel,
    full: Tensor,
    others: Iterable[Tensor],
    ids: Tensor,
    chosen: Tensor,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Sums over the chosen tokens, fp64 on the CPU, (1 + others, 3).

    Row 0 is the whole model: loss in nats, tokens, squares of the states before the head. The other rows: loss in nats,
    KL(whole || other) of the next-token distributions in nats, squared distance of the states before the head.

    Args:
        full: states after the last layer, (batch, seq, hidden); `others` alike, one per path, taken one by one.
        ids: (batch, seq) token ids.
        chosen: (batch, seq - 1), whether a position's next token counts.
    """
    whole, *rest = [_Ending(model, hidden, chosen) for hidden in chain([full], others)]
    targets = ids[:, 1:][chosen]
    sums = torch.zeros(1 + len(rest), 3, dtype=torch.float64)
    step = max(1, chunk_elements // whole.head.vocab)
    for start in range(0, len(targets), step):
        tokens = slice(start, start + step)
        reference, known = whole.states[tokens].float(), whole.log_probs(tokens)
        share, wanted = known.exp(), targets[tokens, None]
        sums[0] += _summed(-known.gather(1, wanted)[:, 0], torch.ones_like(share[:, 0]), reference.square().sum(-1))
        for row, other in enumerate(rest, 1):
            found = other.log_probs(tokens)
            loss = -found.gather(1, wanted)[:, 0]
            divergence = -found.sub_(known).mul_(share).sum(-1)  # in place: the largest tensors there are
            sums[row] += _summed(loss, divergence, (other.states[tokens].float() - reference).square().sum(-1))
    return sums


def _summed(*values: Tensor) -> Tensor:
    """(tokens,) each, to their sums, (values,) fp64."""
    return torch.stack(values).cpu().double().sum(1)
