"""The small models that quality is measured on, and text that each of them knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_cli.config.data import DataConfig
from minitron_cli.data.prepare import run_data
from minitron_cli.runtime.progress import Progress

SEQ_LEN, TOKENS = 128, 1_000_000
STORIES, STORY_TOKENS = 4096, 256


@dataclass(frozen=True)
class World:
    """A model and the source of its text."""

    name: str
    model: str
    source: str

    def prepared(self, out: Path) -> Path:
        """The text as packed sequences."""
        run_data(DataConfig(sources=(self.source,), tokenizer=self.model, seq_len=SEQ_LEN, max_tokens=TOKENS, out=out))
        return out


def worlds(shared: Path | None, directory: Path) -> list[World]:
    """The model that comes with the package on Python source; with `shared`, stories260K on stories of its own.

    Its training text is not at hand, and text that a model does not know judges it falsely: so it writes the text
    itself, and its loss there is the entropy of what it believes.
    """
    found = [World("tiny-py on the Python standard library", "builtin:tiny-py", "python-stdlib")]
    if shared is not None:
        model = shared / "models" / "stories260K"
        if not model.is_dir():
            raise SystemExit(f"{model} is not there; --shared names the folder that holds models/.")
        found.append(World("stories260K on its own stories", str(model), str(_written(model, directory / "own.jsonl"))))
    return found


def _written(path: Path, out: Path) -> Path:
    """Stories that a model tells from their first word, by sampling at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    with out.open("w", encoding="utf-8") as stream, Progress("stories", STORIES, "stories") as progress:
        for _ in range(0, STORIES, 512):
            start = torch.full((512, 1), tokenizer.bos_token_id)
            with torch.inference_mode():
                told = model.generate(
                    start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, temperature=1.0,
                    max_new_tokens=STORY_TOKENS, pad_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
            for ids in told.tolist():
                ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
                length = next((number for number, token in enumerate(ids[1:]) if token in ends), len(ids) - 1)
                stream.write(json.dumps({"text": tokenizer.decode(ids[1 : length + 1])}) + "\n")
            progress.advance(512)
    return out
