"""A tiny checkpoint with a byte-level tokenizer, prepared data for it, and an MMLU folder of invented questions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from helpers import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minitron_cli.tokens import SplitWriter, tokenizer_identity, write_index

VOCABULARY = 300
EOS = 256


def byte_tokenizer(*, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token per UTF-8 byte (and per merge); `<eos>` is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<eos>": EOS}
    vocabulary |= {left + right: EOS + 1 + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_checkpoint(path: Path, **changes: Any) -> Path:
    """A random Llama of two layers with the byte tokenizer and room for 2,048 tokens."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    make_model(path, "llama", **{**sizes, **changes})
    byte_tokenizer().save_pretrained(path)
    return path


def make_data(
    path: Path, *, sequences: int = 7, seq_len: int = 12, bytes_per_token: int = 3, masked: bool = False
) -> Path:
    """A data set with a validation split of random ids; `masked`: about a third of the tokens are targets."""
    path.mkdir()
    generator = np.random.default_rng(5)
    writer = SplitWriter(path, "validation", seq_len, VOCABULARY, masked=masked)
    for _ in range(sequences):
        mask = generator.random(seq_len) < 0.35 if masked else None
        writer.add(generator.integers(0, VOCABULARY, seq_len), seq_len * bytes_per_token, mask)
    counts = {"validation": writer.close()}
    identity = tokenizer_identity(byte_tokenizer())
    write_index(path, seq_len=seq_len, vocab_size=VOCABULARY, tokenizer=identity, masked=masked, splits=counts)
    return path


TRICKY = (
    "None",
    ' "quoted", twice ',
    "two\nlines",
    "1/2",
    "naïve – 日本",
    "",
    "NA",
    "  trailing  ",
    "{{braces}}",
    "007",
)
"""Texts that a careless CSV or template reader changes."""


def question(subject: str, split: str, number: int) -> dict[str, Any]:
    """An invented question in the harness's form; the numbers make all of them differ."""
    start = sum(map(ord, subject + split)) + 3 * number
    choices = [f"{TRICKY[(start + place) % len(TRICKY)]}" for place in range(4)]
    text = f"  {split} {number} of {subject}, {TRICKY[start % len(TRICKY)]}? "
    return {"question": text, "choices": choices, "answer": start % 4}


def questions(subject: str, split: str) -> list[dict[str, Any]]:
    """5 solved examples or 2 test questions, but 3 of anatomy, so that weights matter."""
    count = 5 if split == "dev" else 3 if subject == "anatomy" else 2
    return [question(subject, split, number) for number in range(count)]


def make_mmlu(folder: Path, subjects: list[str]) -> Path:
    """Write the questions of all subjects as CSV."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as stream:
                rows = csv.writer(stream)
                for item in questions(subject, split):
                    rows.writerow([item["question"], *item["choices"], "ABCD"[item["answer"]]])
    return folder
