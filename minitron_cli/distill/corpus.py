"""The data of a training run: where its sequences come from, and what its validation loss is measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import TrainingConfig
from minitron_cli.data.streaming import StreamedSource, StreamedText
from minitron_cli.errors import ConfigError, InputError
from minitron_cli.manifest import StageOutput, fingerprint, write_json
from minitron_cli.models.match import require_same_tokenizer
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.runtime.progress import say
from minitron_cli.tokens import PreparedSource, Source, Split, TokenDataset, is_prepared, tokenizer_identity

SEEN = "state.data.json"
"""Beside a run's checkpoints: fingerprints of the data they were trained on."""


@dataclass(frozen=True)
class Corpus:
    """Opened data. `dataset`: the prepared one, None for a stream; `measured`: what validation reads, of the documents
    `kept` for it or of all. `inputs`: fingerprints of all that decides the tokens.
    """

    source: Source
    dataset: TokenDataset | None
    measured: TokenDataset | StreamedText
    kept: bool
    inputs: dict[str, str]

    def validation(self, sequences: int) -> Split | None:
        """What to measure on, or None where there is nothing; text is read until it gives so many sequences."""
        if isinstance(self.measured, TokenDataset):
            held = self.measured.sequences("validation")
            return self.measured.split("validation") if held or self.measured is not self.dataset else None
        split = self.measured.first_sequences(sequences, kept=self.kept)
        if split is None:
            say(f"No whole sequence of {self.measured.name} is kept for validation; give --val-data to measure losses.")
        return split


def open_corpus(config: TrainingConfig, owners: Mapping[str, str]) -> Corpus:
    """Open the data and check that it fits the checkpoints.

    Args:
        owners: how messages call each checkpoint, and its reference. The first one's tokenizer is used for text.

    Raises:
        ConfigError: --seq-len with prepared data.
        InputError: data that cannot be used, or that has another tokenizer than a checkpoint.
    """
    source: Source
    dataset, text = None, None
    if config.seq_len is None:
        dataset = _prepared(config.data, owners)
        source = PreparedSource(dataset, config.seed, config.batch_size)
        inputs = {"data": fingerprint(config.data)}
    else:
        if is_prepared(config.data):
            raise ConfigError(f"{config.data} is prepared, with a length of its own; leave out --seq-len.")
        _require_one_tokenizer(owners)
        # Other validation data than the source's own: none of its documents is kept from training.
        share = DataConfig.validation if config.val_data is None else 0.0
        text = StreamedText(_reading(config, config.data, config.seq_len, owners, share))
        source = StreamedSource(text, config.seed, config.batch_size)
        inputs = {"data": text.fingerprint}
    if config.val_data is None:
        own = dataset or text
        assert own is not None
        return Corpus(source, dataset, own, True, inputs)
    if is_prepared(config.val_data):
        other = _prepared(config.val_data, owners)
        return Corpus(source, dataset, other, True, inputs | {"validation data": fingerprint(config.val_data)})
    _require_one_tokenizer(owners)
    measured = StreamedText(_reading(config, config.val_data, source.seq_len, owners, 0.0))
    return Corpus(source, dataset, measured, False, inputs | {"validation data": measured.fingerprint})


def _prepared(path: Path, owners: Mapping[str, str]) -> TokenDataset:
    if not is_prepared(path):
        wrong = "is not a prepared data set" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {wrong}; run `minitron data prepare` first, or give --seq-len N with a text source (a file or "
            "directory, a Hub data set id, python-stdlib)."
        )
    dataset = TokenDataset(path)
    require_same_tokenizer(dataset, owners)
    return dataset


def _require_one_tokenizer(owners: Mapping[str, str]) -> None:
    (first, used), *others = owners.items()
    identity = tokenizer_identity(load_tokenizer(used))
    for name, reference in others:
        if tokenizer_identity(load_tokenizer(reference)) != identity:
            raise InputError(
                f"{name} ({reference}) has another tokenizer than {first} ({used}); both must have the same."
            )


def _reading(config: TrainingConfig, data: Path, seq_len: int, owners: Mapping[str, str], share: float) -> DataConfig:
    """How `data prepare` would be told to read text; `share` of its documents are kept for validation."""
    return DataConfig(
        sources=(str(data),), tokenizer=next(iter(owners.values())), seq_len=seq_len, text_column=config.text_column,
        messages=config.messages, subset=config.subset, hub_split=config.hub_split, validation=share, out=config.out,
    )  # fmt: skip


def require_same_data(output: StageOutput, inputs: Mapping[str, str], data: Path) -> None:
    """Refuse to throw away the checkpoints of an interrupted run because its data has changed.

    Raises:
        InputError: it has, and there are checkpoints.
    """
    if output.resuming or output.force or not any(output.partial.glob("state.step-*")):
        return
    try:
        seen = json.loads((output.partial / SEEN).read_text("utf-8"))
    except (OSError, ValueError):
        return
    if seen.get("name") == str(data) and seen.get("fingerprint") != inputs["data"]:
        raise InputError(
            f"{data} has changed since the interrupted run in {output.partial} began; bring it back as it was, or add "
            "--force to start anew."
        )


def note_data(output: StageOutput, inputs: Mapping[str, str], data: Path) -> None:
    """Write down what `require_same_data` compares."""
    write_json(output.partial / SEEN, {"name": str(data), "fingerprint": inputs["data"]})
