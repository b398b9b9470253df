"""The files beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron_cli.checkpoint.reader import INDEX
from minitron_cli.manifest import MANIFEST

NOT_COPIED = {"config.json", INDEX, MANIFEST, "plan.json", "curve.json", "dataset.json"}
NOT_COPIED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md", ".h5", ".msgpack", ".onnx"}


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what makes a checkpoint usable beside its weights: tokenizer, chat template, generation config, licence."""
    for item in sorted(source.iterdir()):
        if item.is_file() and item.name not in NOT_COPIED and item.suffix not in NOT_COPIED_SUFFIXES:
            shutil.copyfile(item, directory / item.name)
