"""Best-of-N sampling when a model is used: N responses, of which the best one is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_cli.align.lessons import Writer, stop_tokens
from minitron_cli.align.prompts import Prompt
from minitron_cli.align.rewards import Checked, Reward
from minitron_cli.align.sampling import Sampler
from minitron_cli.align.weights import best
from minitron_cli.errors import InputError
from minitron_cli.models.tokenizer import separator_id, vocabulary_size


@dataclass(frozen=True)
class Best:
    """The best response to a prompt, and what all of them were worth."""

    prompt: str
    response: str
    reward: float
    rewards: tuple[float, ...]


def best_of_n(
    model: Any, tokenizer: Any, reward: Reward, prompts: Sequence[str], n: int, *, max_new_tokens: int = 64,
    stop: str | None = None, seed: int = 0, batch: int = 256,
) -> list[Best]:  # fmt: skip
    """Sample n responses to each prompt at temperature 1, and keep the one with the largest reward.

    Raises:
        InputError: no prompts, or an empty one for a tokenizer without a start token.
        ConfigError: no token contains the stop text.
        RewardFailed: the reward raises, or is not finite.
    """
    if not prompts or n < 1:
        raise InputError("Best-of-N needs at least one prompt and one sample of it.")
    words = min(int(model.config.get_text_config().vocab_size), vocabulary_size(tokenizer))
    sampler = Sampler(stop_tokens(tokenizer, model, stop, words), words, max_new_tokens, batch)
    name = getattr(reward, "name", type(reward).__name__)
    writer = Writer(sampler, tokenizer, stop, reward if isinstance(reward, Checked) else Checked(name, reward))
    encoded = [_prompt(tokenizer, text) for text in prompts]
    texts = writer.texts(writer.write(model, encoded, n, seed))
    rewards = writer.rewards(encoded, texts)
    found = []
    for row, place in enumerate(best(rewards).tolist()):
        values = tuple(rewards[row].tolist())
        found.append(Best(prompts[row], texts[row * n + place], values[place], values))
    return found


def _prompt(tokenizer: Any, text: str) -> Prompt:
    ids, start = tokenizer(text).input_ids, separator_id(tokenizer)
    if not ids and start is None:
        raise InputError("The tokenizer has no start token for an empty prompt; write one.")
    return Prompt(text, tuple(ids or [start]))
