"""The identity of a tokenizer: the same identity means the same text gives the same ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 over the backend's model, normalizer and pre-tokenizer (or the vocabulary, for a slow tokenizer).

    Padding and truncation settings, chat template and names of special tokens do not change ids and do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        content: Any = [state.get(part) for part in ("model", "normalizer", "pre_tokenizer")]
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
