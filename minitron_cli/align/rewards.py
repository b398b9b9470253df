"""Rewards: what a response to a prompt is worth. Larger is better; only differences within a prompt matter."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from minitron_cli.align.prompts import Prompt
from minitron_cli.align.sampling import Responses, left_padded, log_probs
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.align import AlignConfig, split_words
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.models.load import context_length, load_model
from minitron_cli.models.tokenizer import load_tokenizer

BATCH = 64
"""Texts that a reward model reads at once."""


class Reward(Protocol):
    """Rewards of responses, one for each pair of a prompt and a response."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]:
        """As many numbers as responses."""


class RewardFailed(InputError):
    """The reward raised, or gave something else than finite numbers; what was trained so far is kept."""


@dataclass(frozen=True)
class Checked:
    """A reward whose every answer is checked. `name`: as the user wrote it."""

    name: str
    reward: Reward

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """(responses,) in float64.

        Raises:
            RewardFailed: an error, another number of values, or one that is not finite.
        """
        try:
            values = [float(value) for value in self.reward(prompts, responses)]
        except RewardFailed:
            raise
        except Exception as error:  # a function of the user's, or a model's own
            told = str(error).strip().splitlines() or [""]
            raise RewardFailed(
                f"The reward {self.name} raised {type(error).__name__}{f' ({told[0].rstrip(".")})' if told[0] else ''}; "
                "correct it and run the same command again."
            ) from error
        if len(values) != len(responses):
            raise RewardFailed(
                f"The reward {self.name} gave {len(values)} numbers for {len(responses)} responses; it should give one "
                "for each."
            )
        for value, response in zip(values, responses, strict=True):
            if not math.isfinite(value):
                raise RewardFailed(
                    f"The reward {self.name} is {value} for the response {shortened(response)}; it should be a finite "
                    "number for every text."
                )
        return torch.tensor(values, dtype=torch.float64)


def shortened(text: str) -> str:
    """The start of a text, in quotes."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def require_signal(name: str, rewards: torch.Tensor) -> None:
    """Refuse rewards that tell no response of any prompt from another.

    Args:
        rewards: (prompts, samples).

    Raises:
        RewardFailed: all samples of each prompt are worth the same.
    """
    if tie_rate(rewards) == 1:
        value = f"{rewards[0, 0].item():g}" if (rewards == rewards[0, 0]).all() else "the same for each prompt"
        raise RewardFailed(
            f"The reward {name} is {value} in all {rewards.numel()} responses, so no response is better than another "
            "and there is nothing to learn; use a graded reward, or prompts on which the policy sometimes succeeds."
        )


def tie_rate(rewards: torch.Tensor) -> float:
    """The share of pairs of a prompt's (prompts, samples) that have equal rewards."""
    count = rewards.shape[-1]
    if count < 2:
        return 0.0
    equal = (rewards[..., :, None] == rewards[..., None, :]).sum((-2, -1)) - count
    return float((equal / (count * (count - 1))).mean())


def open_reward(config: AlignConfig, device: torch.device, dtype: torch.dtype) -> Checked:
    """Load what `--reward` names.

    Raises:
        ConfigError: no such function, or a label that the reward model does not have.
        InputError, CheckpointError: a reward model that cannot be used.
    """
    spec = config.reward_spec
    if config.reward_label is not None and spec.kind != "model":
        raise ConfigError("--reward-label names a label of a reward model; leave it out.")
    if spec.kind == "length":
        return Checked(config.reward, Length(int(spec.value)))
    if spec.kind == "words":
        return Checked(config.reward, Words(tuple(split_words(spec.value))))
    if spec.kind == "likelihood":
        return Checked(config.reward, Likelihood(spec.value, device, dtype))
    if spec.kind == "function":
        return Checked(config.reward, function_reward(spec.value))
    return Checked(config.reward, RewardModel(spec.value, config.reward_label, device, dtype))


@dataclass(frozen=True)
class Length:
    """Minus the distance from a number of characters, relative to it."""

    target: int

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """0 at the target, -1 for an empty response."""
        return [-abs(len(response) - self.target) / self.target for response in responses]


@dataclass(frozen=True)
class Words:
    """How many of some words a response has, less a hundredth for each character's share, so that few tie."""

    words: tuple[str, ...]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Distinct words found, plus the share of the text that they cover."""
        return [self._of(response) for response in responses]

    def _of(self, text: str) -> float:
        found = [word for word in self.words if word in text]
        covered = sum(text.count(word) * len(word) for word in found)
        return len(found) + min(1.0, covered / max(len(text), 1))


class Likelihood:
    """Mean log-probability of a response's tokens under another causal LM, in nats per token of that model."""

    def __init__(self, reference: str, device: torch.device, dtype: torch.dtype) -> None:
        checkpoint = Checkpoint(resolve(reference))
        checkpoint.require_unquantised()
        self.reference, self.device = reference, device
        self.tokenizer = load_tokenizer(reference)
        self.model = load_model(checkpoint.path, device=device, dtype=dtype).requires_grad_(False)
        self.context = context_length(dict(checkpoint.config))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The response is read after the prompt; an empty one is worth what the worst token of a uniform guess is."""
        rows = [self._encode(prompt.text, response) for prompt, response in zip(prompts, responses, strict=True)]
        values: list[float] = []
        for start in range(0, len(rows), BATCH):
            values += self._score(rows[start : start + BATCH])
        return values

    def _encode(self, prompt: str, response: str) -> tuple[list[int], int]:
        """Ids of both, and how many belong to the prompt."""
        before = self.tokenizer(prompt).input_ids or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]
        after = self.tokenizer(response, add_special_tokens=False).input_ids
        if self.context is not None and len(before) + len(after) > self.context:
            raise RewardFailed(
                f"{self.reference} reads {self.context} tokens, and a prompt with its response has "
                f"{len(before) + len(after)}; use shorter prompts or a smaller --max-new-tokens."
            )
        return before + after, len(before)

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[float]:
        """Rows aligned at their right ends, the responses' tokens marked row by row."""
        uniform = -math.log(self.model.config.get_text_config().vocab_size)
        values = []
        for ids, start in rows:  # ends differ, so each row has a start of its own
            if len(ids) == start:
                values.append(uniform)
                continue
            tensor, real = left_padded([ids], self.device)
            total = log_probs(self.model, Responses(tensor, real, start), self.model.config.get_text_config().vocab_size)
            values.append(float(total[0]) / (len(ids) - start))
        return values


def function_reward(spec: str) -> Reward:
    """A function `f(prompts, responses)` of a module, looked up from the current directory too; both are lists of text.

    Raises:
        ConfigError: no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(
            f"--reward {spec}: {module_name} cannot be imported ({type(error).__name__}: {error}); it should be a "
            "module on the path or a file in the current directory."
        ) from error
    function: Callable[[list[str], list[str]], Sequence[float]] | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--reward {spec}: {module_name} has no function {name}.")

    def reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float]:
        return function([prompt.text for prompt in prompts], list(responses))

    return reward


class RewardModel:
    """A sequence-classification checkpoint: its one score, or the log-odds of one of its labels."""

    def __init__(self, reference: str, label: str | None, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForSequenceClassification

        path = resolve(reference)
        self.reference, self.device = reference, device
        self.tokenizer = load_tokenizer(reference)
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(path), dtype=dtype, local_files_only=True, output_loading_info=True, use_safetensors=True
            )
        except Exception as error:  # no safetensors, no such class, damaged files: the library raises many kinds
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise InputError(f"--reward {reference}: not a sequence-classification checkpoint ({lines[0]}).") from error
        if info["missing_keys"]:
            raise InputError(
                f"--reward {reference} has no {sorted(map(str, info['missing_keys']))[0]}, so it is no reward model; "
                "a causal LM's opinion is --reward likelihood:CKPT."
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.label = self._label(label)
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        pad = self.model.config.pad_token_id
        self.padded = pad is not None and self.tokenizer.pad_token_id == pad

    def _label(self, label: str | None) -> int | None:
        names = {int(key): str(name) for key, name in self.model.config.id2label.items()}
        if self.model.config.num_labels == 1:
            if label is not None:
                raise ConfigError(f"--reward {self.reference} has one score and no labels; leave out --reward-label.")
            return None
        found = [number for number, name in names.items() if label in (name, str(number))]
        if not found:
            raise ConfigError(
                f"--reward {self.reference} has the labels {', '.join(names.values())}; choose one with --reward-label."
            )
        return found[0]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Prompt and response as one text: through the model's own chat template where the prompt is a conversation."""
        texts = [self._text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        size = BATCH if self.padded else 1  # without padding of its own, a stock class reads one text at a time
        values: list[float] = []
        for start in range(0, len(texts), size):
            values += self._score(texts[start : start + size])
        return values

    def _text(self, prompt: Prompt, response: str) -> list[int]:
        if prompt.messages and self.tokenizer.chat_template:
            turn = {"role": "assistant", "content": response}
            text = self.tokenizer.apply_chat_template([*prompt.messages, turn], tokenize=False)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(prompt.text + response).input_ids
        if not ids:
            raise RewardFailed(f"The tokenizer of {self.reference} makes no token of an empty text; write prompts.")
        if isinstance(self.context, int) and len(ids) > self.context:
            raise RewardFailed(
                f"{self.reference} reads {self.context} tokens, and a prompt with its response has {len(ids)}; use "
                "shorter prompts or a smaller --max-new-tokens."
            )
        return ids

    @torch.no_grad()
    def _score(self, rows: list[list[int]]) -> list[float]:
        if len(rows) > 1:
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        else:
            given = {"input_ids": torch.tensor(rows, device=self.device)}
        logits = self.model(**given).logits.float()
        if self.label is None:
            return [float(value) for value in logits[:, 0]]
        others = [place for place in range(logits.shape[1]) if place != self.label]
        odds = logits[:, self.label] - logits[:, others].logsumexp(1)
        return [float(value) for value in odds]
