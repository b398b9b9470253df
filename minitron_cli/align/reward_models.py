"""Rewards that are models: sequence classifiers, and the likelihood under another causal LM."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minitron_cli.align.prompts import Prompt
from minitron_cli.align.rewards import Checked, Length, RewardFailed, Words, function_reward
from minitron_cli.align.sampling import Responses, log_probs
from minitron_cli.checkpoint.hub import resolve
from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.align import AlignConfig, split_words
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.models.load import context_length, load_model
from minitron_cli.models.tokenizer import load_tokenizer, separator_id

BATCH = 64
"""Texts that are read at once."""


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
        """The response is read after the prompt; an empty one is worth a uniform guess."""
        rows = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        values: list[float] = []
        for start in range(0, len(rows), BATCH):
            values += self._score(rows[start : start + BATCH])
        return values

    def _encode(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """Ids of both, and how many belong to the prompt; a rendered conversation has its special tokens already."""
        before: list[int] = self.tokenizer(prompt.text, add_special_tokens=not prompt.messages).input_ids
        if not before:
            start = separator_id(self.tokenizer)
            if start is None:
                raise RewardFailed(f"{self.reference} has no start token that an empty prompt needs; write prompts.")
            before = [start]
        after = self.tokenizer(response, add_special_tokens=False).input_ids
        if self.context is not None and len(before) + len(after) > self.context:
            raise RewardFailed(
                f"{self.reference} reads {self.context} tokens, and a prompt with its response has "
                f"{len(before) + len(after)}; use shorter prompts or a smaller --max-new-tokens."
            )
        return before + after, len(before)

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[float]:
        """Rows share the column where responses begin."""
        words = int(self.model.config.get_text_config().vocab_size)
        ones = torch.ones(1, max(len(ids) for ids, _ in rows), dtype=torch.bool)
        parts = [Responses(torch.tensor([ids]), ones[:, : len(ids)], start) for ids, start in rows]
        joined = Responses.join(parts)
        batch = Responses(joined.ids.to(self.device), joined.real.to(self.device), joined.start)
        totals, lengths = log_probs(self.model, batch, words).tolist(), batch.lengths.tolist()
        return [total / length if length else -math.log(words) for total, length in zip(totals, lengths, strict=True)]


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
