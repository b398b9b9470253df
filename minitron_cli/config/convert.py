"""Options of `minitron convert`."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_cli.config.base import WritingConfig, argument


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(WritingConfig):
    """Rewrite a checkpoint with pickled weights (*.bin) as safetensors; code inside the pickles is never run."""

    checkpoint: str = argument("Local directory that holds pytorch_model*.bin.", keyed=False)
