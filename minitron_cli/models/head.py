"""The output head on its own: logits of some hidden states, exactly as the stock class makes them.

The stock forward runs with its backbone replaced by finished hidden states, so that soft-caps, logit scales, divisors
and biases of every family apply without being listed anywhere.
"""

from __future__ import annotations

from typing import Any

import torch


def backbone_of(model: Any) -> Any:
    """The module whose output the head takes: most often the base model, in OPT the decoder inside it."""
    return model.get_decoder()


def backbone_output(model: Any, ids: torch.Tensor) -> Any:
    """The output of the model without its head for (batch, seq) ids; `.last_hidden_state` is (batch, seq, hidden)."""
    return backbone_of(model)(input_ids=ids, use_cache=False)


class Head:
    """The head of a model, after one of its backbone's outputs (which may carry more than hidden states)."""

    def __init__(self, model: Any, output: Any) -> None:
        self.model = model
        self._kind = type(output)
        self._rest = {name: value for name, value in output.items() if name != "last_hidden_state"}

    @property
    def vocab(self) -> int:
        """Logits per token."""
        return int(self.model.config.get_text_config().vocab_size)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) to (tokens, vocab) logits in fp32; gradients flow to `hidden` and the head's weights."""
        finished = self._kind(last_hidden_state=hidden[None], **self._rest)
        placeholder = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        backbone = backbone_of(self.model)
        backbone.forward = lambda *args, **kwargs: finished
        try:
            logits: torch.Tensor = self.model(input_ids=placeholder, use_cache=False).logits
        finally:
            del backbone.forward  # the class's own is visible again
        return logits[0].float()
