"""One document on its way from a source to the packed file, and the rule that gives it to train or validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_cli.errors import InputError


@dataclass
class SplitRule:
    """Which documents are validation: those whose key hashes to 0 modulo `one_in`; `one_in` 0 means none.

    The rule looks at nothing but the key, so a file or a row falls to the same side in every corpus, order and version.
    `full` is set by the reader of validation documents when it wants no more: sources may then skip them unread.
    """

    one_in: int
    full: bool = False

    def is_validation(self, key: str) -> bool:
        """Whether the document named `key` (a relative path, or the text itself) is kept for validation."""
        if not self.one_in:
            return False
        return int(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest(), 16) % self.one_in == 0


@dataclass(frozen=True)
class Document:
    """A text, or a conversation still to be rendered.

    `read`: bytes of input this document used up, for progress. `where`: file and line or row, for error messages.
    """

    text: str
    validation: bool
    read: int
    where: str
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Column:
    """The column of a row that becomes a document: plain text, or a list of chat messages."""

    name: str
    chat: bool

    def document(self, value: Any, where: str, read: int, rule: SplitRule) -> Document | None:
        """A row's value as a document; None when it is null, blank, or a conversation without assistant turns.

        Raises:
            InputError: the value is not text, or not messages with roles.
        """
        if value is None:
            return None
        if self.chat:
            messages = _messages(value, self.name, where)
            if not any(message["role"] == "assistant" for message in messages):
                return None
            key = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
            require_text(key, where)
            return Document("", rule.is_validation(key), read, where, messages)
        if not isinstance(value, str):
            raise InputError(f"{where}: column '{self.name}' holds {type(value).__name__}, not text.")
        if not value.strip():
            return None
        require_text(value, where)
        return Document(value, rule.is_validation(value), read, where)


def missing_column(where: str, column: str, present: Iterable[str]) -> InputError:
    """The error for rows that lack the wanted column."""
    names = ", ".join(sorted(present)) or "no columns"
    return InputError(f"{where} has no column '{column}', only {names}; choose with --text-column or --messages.")


def require_text(text: str, where: str) -> None:
    """Refuse strings that UTF-8 cannot hold (JSON allows half a surrogate pair).

    Raises:
        InputError: naming the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is half a surrogate pair, which no text may hold."
        ) from None


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """Messages as plain dictionaries; Parquet fills absent fields with null, which templates would print as "None"."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{where}: column '{column}' is not a list of messages.")
    messages = [{str(k): v for k, v in item.items() if v is not None} for item in value]
    for message in messages:
        if not isinstance(message.get("role"), str) or not ("content" in message or "tool_calls" in message):
            raise InputError(
                f"{where}: a message of column '{column}' has keys {', '.join(message) or 'none'}; "
                "each needs 'role' and 'content'."
            )
    return messages
