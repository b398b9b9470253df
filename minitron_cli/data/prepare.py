"""`minitron data prepare`: text from anywhere becomes packed token sequences on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitron_cli.config.data import DataConfig
from minitron_cli.data.chat import ChatRenderer
from minitron_cli.data.consent.record import audit_of
from minitron_cli.data.meter import Meter
from minitron_cli.data.mix import merge
from minitron_cli.data.sources import Source, open_sources, parse_weight
from minitron_cli.data.tokenise import Encoded, Encoder, encode_all, thread_pool
from minitron_cli.errors import InputError
from minitron_cli.manifest import StageOutput, digest, require_disk
from minitron_cli.models.tokenizer import context_length, load_tokenizer, vocabulary_size
from minitron_cli.runtime.progress import say
from minitron_cli.tokens import SplitWriter, tokenizer_identity, write_index
from minitron_cli.tokens.writer import token_dtype

BYTES_PER_TOKEN = 2.5
"""Low guess for the disk estimate; vocabularies of 32k and more reach 3.5 to 5 on prose."""

MIN_VALIDATION_SEQUENCES = 64
"""With --max-tokens a small train split still gets a validation split this large, where the sources hold it."""


@dataclass(frozen=True)
class DataResult:
    """What was written: `tokens` and `sequences` over all splits (whole sequences), `documents` read into them.

    `splits`: per split `sequences`, `tokens`, `documents`, and `tokens_seen` and `bytes_seen`, which include the last,
    incomplete sequence; their ratio is the bytes per token. `consent`: source to the summary of the audit that wrote
    it, for sources that one did.
    """

    out: Path
    tokens: int
    sequences: int
    documents: int
    splits: Mapping[str, Mapping[str, int]]
    consent: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "out": str(self.out),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "documents": self.documents,
            "splits": {name: dict(counts) for name, counts in self.splits.items()},
            **({"consent": dict(self.consent)} if self.consent else {}),
        }


def run_data(config: DataConfig) -> DataResult:
    """Tokenise, split and pack the sources into `config.out`.

    Documents are joined into one stream per split, each opened by the separator (the tokenizer's bos token, else its
    eos token), and cut into rows of `seq_len`; the incomplete last row is dropped. A document is validation when the
    SHA-256 of its key is 0 modulo round(1/validation); the key is the path inside the directory for whole files and
    the text itself for rows, lines and paragraphs, so equal texts never lie on both sides.

    `max_tokens` ends the train split at exactly that many tokens (the last document is cut). Validation then takes at
    most max(2 * max_tokens * validation, 64 sequences) tokens of each source: from directories these are read first,
    from rows and lines they are what was met on the way.

    The same inputs, configuration and seed give the same bytes, whatever `workers` is.

    Raises:
        UserError: any input that cannot be used; nothing is left behind.
        RunError: the disk filled up.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    chat = ChatRenderer(tokenizer, config.tokenizer) if config.messages is not None else None
    encoder = Encoder(tokenizer, chat)
    names = [parse_weight(word)[0] for word in config.sources]
    consent = {name: audit for name in names if (audit := audit_of(name)) is not None}
    sources = open_sources(config)
    inputs = _inputs(sources, tokenizer, encoder) | ({"consent": digest(consent)} if consent else {})
    output = StageOutput(config.out, "data", config, inputs, force=config.force)
    if output.result is not None:
        say(f"{config.out} is up to date.")
        return _result(config.out, output.result["splits"], output.result.get("consent", {}))
    _notices(config, tokenizer, encoder)
    vocab_size = vocabulary_size(tokenizer)
    require_disk(config.out, _disk_needed(config, sources, vocab_size), "The prepared data")
    with output:
        packing = _Packing(config, sources, output.partial, vocab_size)
        splits = packing.run(encoder)
        write_index(
            output.partial, seq_len=config.seq_len, vocab_size=vocab_size, tokenizer=tokenizer_identity(tokenizer),
            masked=chat is not None, splits=splits,
            extra={"sources": packing.summary(), "separator": encoder.separator},
        )  # fmt: skip
        result = _result(config.out, splits, consent)
        output.commit(result.to_json())
    return result


def _inputs(sources: list[Source], tokenizer: Any, encoder: Encoder) -> dict[str, str]:
    """Fingerprints of all that decides the tokens, beside the configuration."""
    inputs = {"tokenizer": digest([tokenizer_identity(tokenizer), encoder.separator, vocabulary_size(tokenizer)])}
    if encoder.chat is not None:
        inputs["chat_template"] = digest(encoder.chat.template)
    for number, source in enumerate(sources, 1):
        inputs[f"source {number}"] = digest([source.kind, source.weight, source.identity])
    return inputs


def _result(out: Path, splits: Mapping[str, Mapping[str, int]], consent: Mapping[str, Any]) -> DataResult:
    totals = {key: sum(counts[key] for counts in splits.values()) for key in ("tokens", "sequences", "documents")}
    return DataResult(out=out, splits=splits, consent=consent, **totals)


def _notices(config: DataConfig, tokenizer: Any, encoder: Encoder) -> None:
    limit = context_length(config.tokenizer, tokenizer)
    if limit is not None and config.seq_len > limit:
        say(f"--seq-len {config.seq_len} is more than the {limit} positions that {config.tokenizer} was made for.")
    if encoder.separator is None and encoder.chat is None:
        say(f"{config.tokenizer} has neither a bos nor an eos token; documents are packed without a separator.")


def _disk_needed(config: DataConfig, sources: list[Source], vocab_size: int) -> int:
    """Bytes the output will take at most, roughly; 0 where nothing tells the size of a source beforehand."""
    per_token = np.dtype(token_dtype(vocab_size)).itemsize + (config.messages is not None)
    known = all(source.size for source in sources)
    tokens = sum(source.size for source in sources) / BYTES_PER_TOKEN if known else 0.0
    if config.max_tokens is not None:
        limit = config.max_tokens * (1 + 2 * config.validation)
        tokens = min(tokens, limit) if known else limit
    return int(tokens * per_token)


class _Packing:
    """The work between the open sources and the closed split files."""

    def __init__(self, config: DataConfig, sources: list[Source], directory: Path, vocab_size: int) -> None:
        self.config, self.sources = config, sources
        masked = config.messages is not None
        names = ["train", "validation"] if config.validation else ["train"]
        self.writers = {name: SplitWriter(directory, name, config.seq_len, vocab_size, masked=masked) for name in names}
        self.train = self.writers["train"]
        self.counts = [{"documents": 0, "train_tokens": 0, "validation_tokens": 0} for _ in sources]
        self.room = float("inf") if config.max_tokens is None else config.max_tokens
        self.caps = self._validation_caps()

    def _validation_caps(self) -> list[float]:
        """Validation tokens to take from each source; infinite without --max-tokens."""
        if self.config.max_tokens is None:
            return [float("inf")] * len(self.sources)
        least = MIN_VALIDATION_SEQUENCES * self.config.seq_len
        cap = max(2 * self.config.max_tokens * self.config.validation, least)
        weights = [source.weight or 1.0 for source in self.sources]
        mixed = self.sources[0].weight is not None
        return [cap * weight / sum(weights) if mixed else cap for weight in weights]

    def run(self, encoder: Encoder) -> dict[str, dict[str, int]]:
        """Write all splits; returns their entries of dataset.json.

        Raises:
            InputError: a source cannot be read, or the train split has no whole sequence.
        """
        reached = 0
        with thread_pool(self.config.workers) as (pool, ahead), self._meter() as meter:
            streams = [encode_all(source.documents(), encoder, pool, ahead) for source in self.sources]
            weights = [source.weight for source in self.sources]
            for index, item in merge(streams, weights, [source.name for source in self.sources]):
                self._take(index, item)
                meter.count(item, self.train.tokens_seen)
                reached = max(reached, index)
                if self.room <= 0:
                    break
        splits = {name: writer.close() for name, writer in self.writers.items()}
        self._check(splits)
        if self.room <= 0 and reached + 1 < len(self.sources) and self.sources[0].weight is None:
            unread = ", ".join(source.name for source in self.sources[reached + 1 :])
            say(f"--max-tokens was reached before {unread}; weight the sources (SOURCE@0.5) to mix them.")
        return splits

    def _meter(self) -> Meter:
        known = all(source.size for source in self.sources)
        return Meter(sum(source.size for source in self.sources) if known else 0, self.config.max_tokens)

    def _take(self, index: int, item: Encoded) -> None:
        counts = self.counts[index]
        if item.validation:
            if counts["validation_tokens"] < self.caps[index]:
                self.writers["validation"].add(item.ids, item.text_bytes, item.mask)
                counts["validation_tokens"] += len(item.ids)
                counts["documents"] += 1
            self.sources[index].rule.full = counts["validation_tokens"] >= self.caps[index]
            return
        kept = int(min(len(item.ids), self.room))
        # Of a document that is cut, the bytes count by the share of its tokens that stay: bytes per token is unmoved.
        text_bytes = round(item.text_bytes * kept / max(len(item.ids), 1))
        self.train.add(item.ids[:kept], text_bytes, None if item.mask is None else item.mask[:kept])
        self.room -= kept
        counts["train_tokens"] += kept
        counts["documents"] += 1

    def _check(self, splits: dict[str, dict[str, int]]) -> None:
        names, seq_len = ", ".join(source.name for source in self.sources), self.config.seq_len
        train, validation = splits["train"], splits.get("validation")
        if not train["documents"] and not (validation and validation["documents"]):
            what = "no conversation with an assistant turn" if self.config.messages else "no text"
            raise InputError(f"{names}: {what}.")
        if not train["documents"]:
            raise InputError(
                f"{names}: all {validation and validation['documents']} documents fell to validation; "
                "use more text, --validation 0 or a finer --split-documents."
            )
        if not train["sequences"]:
            raise InputError(
                f"{names}: {train['tokens_seen']} train tokens are less than one sequence of {seq_len} (--seq-len); "
                "use more text or shorter sequences."
            )
        if validation is not None and not validation["sequences"]:
            say(
                f"Validation holds no whole sequence ({validation['documents']} documents, {validation['tokens_seen']} "
                f"tokens, --seq-len {seq_len}); raise --validation or use more text to measure losses on this data."
            )

    def summary(self) -> list[dict[str, Any]]:
        """What each source gave, for dataset.json."""
        return [
            {"source": source.name, "kind": source.kind, "weight": source.weight, **counts}
            for source, counts in zip(self.sources, self.counts, strict=True)
        ]
