"""A checkpoint with a tokenizer and a prepared data set that fit together, for tests of training stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from helpers import make_model
from helpers_tokenizer import make_tokenizer

from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.tokens import SplitWriter, tokenizer_identity, write_index

SMALL: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}


def make_checkpoint(path: Path, **changes: Any) -> Path:
    """A tiny Llama whose vocabulary is that of the test tokenizer."""
    make_tokenizer(path)
    vocab = len(load_tokenizer(path))
    return make_model(path, vocab_size=vocab, **{**SMALL, **changes})


def make_data(path: Path, checkpoint: Path, *, seq_len: int = 16, train: int = 64, validation: int = 8) -> Path:
    """Random tokens with structure (each depends on the one before), so that training has something to learn."""
    path.mkdir(parents=True)
    tokenizer = load_tokenizer(checkpoint)
    vocab = len(tokenizer)
    generator = np.random.default_rng(0)
    splits = {}
    for name, rows in (("train", train), ("validation", validation)):
        writer = SplitWriter(path, name, seq_len, vocab)
        ids = [0]
        for _ in range(rows * seq_len - 1):
            ids.append((ids[-1] * 3 + int(generator.integers(0, 2))) % 20)
        writer.add(ids, 4 * len(ids))
        splits[name] = writer.close()
    identity = tokenizer_identity(tokenizer)
    write_index(path, seq_len=seq_len, vocab_size=vocab, tokenizer=identity, masked=False, splits=splits)
    return path
