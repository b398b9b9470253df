"""The identity of a tokenizer: the same identity means the same text gives the same ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 over the backend's model, added tokens, normalizer and pre-tokenizer (a slow tokenizer: its vocabulary).

    Padding and truncation settings, chat template and the roles of special tokens do not change ids and do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        added = sorted((token["id"], token["content"]) for token in state.get("added_tokens") or [])
        content: Any = [added, *(state.get(part) for part in ("model", "normalizer", "pre_tokenizer"))]
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
