"""Load a tokenizer, and the few facts about it that packing needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_cli.checkpoint.hub import is_local, resolve
from minitron_cli.errors import CheckpointError


def load_tokenizer(reference: str | Path) -> Any:
    """The tokenizer of a checkpoint: a directory, `builtin:NAME` or a Hub id; no code of the checkpoint is run.

    Raises:
        CheckpointError: the path is missing, holds no usable tokenizer files, or the Hub cannot give it.
    """
    reference = str(reference)
    # The Hub is asked for config.json first: that fails once and with a sentence, where AutoTokenizer retries per file.
    path = resolve(reference, config_only=True)
    from_hub = not (is_local(reference) or reference.startswith("builtin:"))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            reference if from_hub else str(path), local_files_only=not from_hub, trust_remote_code=False
        )
    except Exception as error:  # damaged files surface as JSON, key, value, OS and Rust errors
        if not from_hub and not any(path.glob("*token*")) and not any(path.glob("vocab*")):
            raise CheckpointError(
                f"{reference} holds no tokenizer files; give a directory with tokenizer.json."
            ) from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(f"{reference}: transformers cannot load its tokenizer: {lines[0]}") from error


def context_length(reference: str | Path, tokenizer: Any) -> int | None:
    """Positions the model of this tokenizer was made for, in tokens; None where nothing says."""
    if is_local(str(reference)) or str(reference).startswith("builtin:"):
        try:
            config = json.loads((resolve(reference) / "config.json").read_text("utf-8"))
            positions = config.get("max_position_embeddings") or config.get("n_positions")
        except (OSError, ValueError):
            positions = None
        if isinstance(positions, int):
            return positions
    limit = getattr(tokenizer, "model_max_length", None)
    # Tokenizers that know no limit say 10**30.
    return int(limit) if isinstance(limit, int) and limit < 1 << 40 else None


def separator_id(tokenizer: Any) -> int | None:
    """The token that opens a document in a packed stream: bos, or eos where there is no bos; None without either."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return None


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id, added tokens included."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
