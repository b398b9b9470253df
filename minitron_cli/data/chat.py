"""Conversations: the tokenizer's own chat template, and which characters of the result the assistant wrote."""

from __future__ import annotations

import re
from typing import Any

from minitron_cli.errors import ConfigError, InputError
from minitron_cli.runtime.progress import say

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders conversations and finds the assistant's part.

    A template with `{% generation %}` markers says itself what the assistant wrote, and is believed. For the others
    each assistant turn is what its turn adds to the prompt before it: rendered(messages up to the turn) minus
    rendered(messages before it, with the generation prompt). That includes the end-of-turn token and leaves out the
    header, as in generation.
    """

    def __init__(self, tokenizer: Any, reference: str) -> None:
        """Check that there is a template.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        try:
            template = str(tokenizer.get_chat_template())
        except (ValueError, AttributeError):
            raise ConfigError(
                f"--messages: the tokenizer of {reference} has no chat template; use the instruct model's tokenizer, "
                "or render the conversations into a text column."
            ) from None
        self.template = template
        self.tokenizer = tokenizer
        self.marked = _GENERATION.search(template) is not None
        # Llama 3 templates print today's date unless told one; their own fallback keeps runs repeatable.
        self.extra = {"date_string": "26 Jul 2024"} if "date_string" in template else {}
        if "strftime_now" in template and not self.extra:
            say("The chat template may print today's date; the same command on another day may then give other tokens.")

    def render(self, messages: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans the assistant wrote.

        Raises:
            InputError: the template refuses the conversation.
            ConfigError: the template rewrites earlier turns, so that no turn can be told apart.
        """
        text = self._text(messages, where)
        spans = self._marked_spans(messages) if self.marked else []
        if spans:
            return text, spans
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._turn(messages, position, text, where))
        return text, spans

    def prompt(self, messages: list[dict[str, Any]], where: str) -> str:
        """The text of a conversation up to where the assistant's next turn begins.

        Raises:
            InputError: the template refuses the conversation.
        """
        return self._text(messages, where, prompt=True)

    def _text(self, messages: list[dict[str, Any]], where: str, *, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self.extra)
            )
        except Exception as error:  # whatever the template raises; jinja2.TemplateError for its own refusals
            raise InputError(f"{where}: the chat template refuses this conversation: {error}.") from None

    def _turn(self, messages: list[dict[str, Any]], position: int, text: str, where: str) -> Span:
        after = self._text(messages[: position + 1], where)
        if position == 0:
            start = max(text.find(str(messages[0].get("content", ""))), 0)
        else:
            before = self._text(messages[:position], where, prompt=True)
            start = len(before)
            if not after.startswith(before):
                raise self._unstable(where)
        if not text.startswith(after.rstrip()):
            raise self._unstable(where)
        # The line break after the end-of-turn token belongs to the next turn: generation has stopped by then.
        return start, max(start, len(after.rstrip()))

    def _unstable(self, where: str) -> ConfigError:
        return ConfigError(
            f"{where}: the chat template renders an assistant turn differently once more turns follow, so its tokens "
            "cannot be told apart; add {% generation %} markers to the template, or give single-turn conversations."
        )

    def _marked_spans(self, messages: list[dict[str, Any]]) -> list[Span]:
        """Spans by the template's own markers, through token offsets: the public interface gives a mask over tokens."""
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True}, **self.extra,
        )  # fmt: skip
        pairs = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        return [(int(start), int(end)) for chosen, (start, end) in pairs if chosen and end > start]
