"""Do a data set and a checkpoint speak the same token ids?"""

from __future__ import annotations

from collections.abc import Mapping

from minitron_cli.errors import InputError
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.tokens import TokenDataset, tokenizer_identity


def require_same_tokenizer(dataset: TokenDataset, owners: Mapping[str, str]) -> None:
    """Compare the tokenizer that prepared the data with those of checkpoints.

    Args:
        owners: how to call each checkpoint in the message, and its reference as the user wrote it.

    Raises:
        InputError: one has another tokenizer.
        CheckpointError: one has none.
    """
    for name, reference in owners.items():
        if tokenizer_identity(load_tokenizer(reference)) != dataset.tokenizer:
            raise InputError(
                f"{dataset.directory} was prepared with another tokenizer than that of {name} ({reference}); "
                f"prepare it again with --tokenizer {reference}."
            )
