"""Samples of one case to numbers, and two checkpoints to ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minitron_cli.bench.worker import Case, Sample


@dataclass(frozen=True)
class Summary:
    """Medians over rounds; rates count all sequences of the batch. Latencies in seconds, sizes in bytes.

    `token_p50` to `token_p99`: over every generated token of every round.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    token_p50: float
    token_p90: float
    token_p99: float
    peak_bytes: int
    kv_bytes: int
    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]


def summarise(case: Case, samples: Sequence[Sample], kv_bytes: int) -> Summary:
    """The numbers of one checkpoint in one case."""
    prefill = tuple(case.batch_size * case.context / sample.first_token for sample in samples)
    decode = tuple(case.batch_size * len(sample.tokens) / sum(sample.tokens) for sample in samples)
    tokens = np.concatenate([sample.tokens for sample in samples])
    p50, p90, p99 = (float(value) for value in np.percentile(tokens, (50, 90, 99)))
    return Summary(
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        time_to_first_token=statistics.median(sample.first_token for sample in samples),
        token_p50=p50,
        token_p90=p90,
        token_p99=p99,
        peak_bytes=max(sample.peak_bytes for sample in samples),
        kv_bytes=kv_bytes,
        prefill_rounds=prefill,
        decode_rounds=decode,
    )


def compare(ours: Summary, theirs: Summary) -> dict[str, float]:
    """Our value over theirs: speeds above 1 are faster, times and sizes below 1 smaller.

    Speeds and the time to the first token are medians of the rounds' own ratios, speeds with the lowest and highest of
    them: a machine that is slow for a while is slow for both.
    """
    ratio: dict[str, float] = {}
    for name in ("prefill", "decode"):
        pairs = zip(getattr(ours, f"{name}_rounds"), getattr(theirs, f"{name}_rounds"), strict=True)
        each = [own / other for own, other in pairs]
        ratio |= {name: statistics.median(each), f"{name}_low": min(each), f"{name}_high": max(each)}
    # A round reads the same prompt on both sides: times are as the inverse of speeds.
    waits = [other / own for own, other in zip(ours.prefill_rounds, theirs.prefill_rounds, strict=True)]
    ratio["time_to_first_token"] = statistics.median(waits)
    for name in ("token_p50", "token_p99", "peak_bytes", "kv_bytes"):
        other = getattr(theirs, name)
        ratio[name] = getattr(ours, name) / other if other else 1.0
    return ratio
