"""The files beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron_cli.checkpoint.reader import INDEX
from minitron_cli.errors import CheckpointError
from minitron_cli.manifest import MANIFEST

NOT_COPIED = {"config.json", INDEX, MANIFEST, "plan.json", "curve.json", "log.jsonl", "dataset.json"}
NOT_COPIED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md", ".h5", ".msgpack", ".onnx"}
TERMS = ("license", "licence", "notice", "copying", "use_policy")
"""Terms of use travel with the weights, also where they are Markdown."""


def companions(source: Path) -> list[Path]:
    """What makes a checkpoint usable beside its weights: tokenizer, chat template, generation config, licence."""
    return [
        item
        for item in sorted(source.iterdir())
        if item.is_file()
        and item.name not in NOT_COPIED
        and (item.suffix not in NOT_COPIED_SUFFIXES or item.name.lower().startswith(TERMS))
    ]


def copy_companions(source: Path, directory: Path) -> None:
    """Copy the companions of one checkpoint beside another's weights."""
    for item in companions(source):
        shutil.copyfile(item, directory / item.name)


def check_companions(source: Path, directory: Path) -> None:
    """Insist that every companion of `source` arrived whole.

    Raises:
        CheckpointError: one is missing or of another length.
    """
    for item in companions(source):
        copy = directory / item.name
        if not copy.is_file() or copy.stat().st_size != item.stat().st_size:
            raise CheckpointError(f"{item.name} of {source} did not arrive in {directory}; run the command again.")
