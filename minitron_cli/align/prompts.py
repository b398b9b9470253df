"""Prompts: rows of a JSONL file, plain or chat, or the starts of a prepared data set's sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_cli.data.chat import ChatRenderer
from minitron_cli.data.readers import Row, json_rows
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.models.tokenizer import separator_id
from minitron_cli.tokens import TokenDataset, is_prepared, tokenizer_identity

KEPT = 10
"""One prompt of a file in so many is kept for measuring, where the file has twice as many."""


@dataclass(frozen=True)
class Prompt:
    """A text and its tokens. `messages`: the conversation it was rendered from."""

    text: str
    ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] = ()


class PromptReader:
    """Reads prompts for one tokenizer.

    Args:
        reference: what messages call the model.
        longest: tokens a prompt may have, or None where there is no limit.
    """

    def __init__(self, tokenizer: Any, reference: str, longest: int | None, prompt_tokens: int) -> None:
        self.tokenizer, self.reference, self.longest = tokenizer, reference, longest
        self.prompt_tokens = prompt_tokens
        self._renderer: ChatRenderer | None = None

    def training_and_kept(self, path: Path, other: Path | None) -> tuple[list[Prompt], list[Prompt], bool]:
        """Prompts to train on, prompts to measure on, and whether training leaves the latter out.

        Raises:
            InputError: a path or a row that cannot be used.
        """
        if other is not None:
            return self.read(path), self.read(other), True
        if is_prepared(path):
            held = TokenDataset(path).sequences("validation")
            return self.read(path), self.read(path, "validation" if held else "train"), bool(held)
        prompts = self.read(path)
        if len(prompts) < 2 * KEPT:
            return prompts, prompts, False
        return [p for i, p in enumerate(prompts) if i % KEPT], prompts[::KEPT], True

    def read(self, path: Path, split: str = "train") -> list[Prompt]:
        """All prompts of a file or of a split.

        Raises:
            InputError: no such path, no prompt, a row without one, or one that is too long.
        """
        if not path.exists():
            raise InputError(f"{path} does not exist; give a JSONL file of prompts or a prepared data set.")
        found = list(self._sequences(path, split)) if is_prepared(path) else list(self._rows(path))
        if not found:
            raise InputError(f"{path} holds no prompts; each line should be an object with `prompt` or `messages`.")
        return found

    def _sequences(self, path: Path, split: str) -> Iterator[Prompt]:
        dataset = TokenDataset(path)
        if dataset.tokenizer != tokenizer_identity(self.tokenizer):
            raise InputError(
                f"{path} was tokenised with another tokenizer than that of {self.reference}; prepare it again."
            )
        length = min(self.prompt_tokens, dataset.seq_len)
        self._require_fit(length, str(path))
        for row in dataset.split(split).tokens[:, :length]:
            ids = tuple(map(int, row))
            yield Prompt(self.tokenizer.decode(ids, skip_special_tokens=True), ids)

    def _rows(self, path: Path) -> Iterator[Prompt]:
        if path.is_dir():
            raise InputError(f"{path} is a directory and no prepared data set; give a JSONL file of prompts.")
        for row in json_rows(path):
            prompt = self._prompt(row)
            self._require_fit(len(prompt.ids), row[0])
            yield prompt

    def _prompt(self, row: Row) -> Prompt:
        where, values, _ = row
        text, messages = values.get("prompt"), values.get("messages")
        if isinstance(text, str) and messages is None:
            ids = self.tokenizer(text).input_ids
            start = separator_id(self.tokenizer)
            if not ids and start is None:
                raise InputError(f"{where}: the prompt is empty and the tokenizer has no start token; write a prompt.")
            return Prompt(text, tuple(ids or [start]))
        if isinstance(messages, list) and text is None:
            conversation = _conversation(messages, where)
            text = self._chat().prompt(conversation, where)
            return Prompt(text, tuple(self.tokenizer(text, add_special_tokens=False).input_ids), tuple(conversation))
        raise InputError(f"{where}: a row needs `prompt`, a text, or `messages`, a list; it has {_names(values)}.")

    def _chat(self) -> ChatRenderer:
        if self._renderer is None:
            try:
                self._renderer = ChatRenderer(self.tokenizer, self.reference)
            except ConfigError:
                raise InputError(
                    f"The tokenizer of {self.reference} has no chat template; write `prompt` texts instead of "
                    "`messages`."
                ) from None
        return self._renderer

    def _require_fit(self, length: int, where: str) -> None:
        if self.longest is not None and length > self.longest:
            raise InputError(
                f"{where}: the prompt has {length} tokens and {self.reference} has room for {self.longest} beside the "
                "response; shorten it or use a smaller --max-new-tokens."
            )


def _conversation(messages: list[Any], where: str) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: each of the `messages` should be an object with `role` and `content`.")
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: `messages` should end before the assistant's turn, which the policy writes.")
    return messages


def _names(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in list(values.items())[:5]) or "nothing"
