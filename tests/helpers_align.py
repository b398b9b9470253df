"""A tiny policy, prompts and options for tests of alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers_chain import make_checkpoint

from minitron_cli.config.align import AlignConfig

TEXTS = ("the quick brown", "def add(first", "user: what", "return", "over the lazy dog", "the answer is below", "f")


def make_prompts(path: Path, count: int = 40) -> Path:
    rows = [{"prompt": TEXTS[number % len(TEXTS)] + " fox" * (number % 3)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_place(folder: Path, *, make: bool = True) -> dict[str, Any]:
    """A policy and prompts in a folder, where they are not there yet, and the options of a short run on them."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(folder / "policy")
        make_prompts(folder / "prompts.jsonl")
    return {
        "policy": str(folder / "policy"), "prompts": folder / "prompts.jsonl",
        "reward": "length:40", "steps": 4, "batch_size": 4, "n": 4, "k": 4, "max_new_tokens": 8, "eval_samples": 32,
        "eval_every": 2, "lr": 1e-3, "device": "cpu",
    }  # fmt: skip


def options(place: dict[str, Any], out: Path, **changes: Any) -> AlignConfig:
    return AlignConfig(**{**place, "out": out, **changes})
