"""Ask a teacher about every sequence of a run, once; exact on resume."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor

from minitron_cli.distill.cache import INDEX, RECORDS, Content
from minitron_cli.distill.fused import Lesson, logits_bytes
from minitron_cli.distill.losses import TopK, top_k
from minitron_cli.distill.trainer import Batch, Teacher
from minitron_cli.manifest import StageOutput, write_json
from minitron_cli.models.chunks import block_tokens, chunk_tokens, parts
from minitron_cli.runtime.memory import require_memory
from minitron_cli.runtime.progress import Progress, say
from minitron_cli.shape import Shape
from minitron_cli.tokens import Split
from minitron_cli.tokens.stream import read_rows

STATE = "state.json"
PASS_TOKENS = 4096
"""Tokens of one teacher pass. Always the same cut into passes: a resumed run then writes the same bytes."""
SAVE_SECONDS = 5.0
"""How often what was written is made durable; a kill costs at most this much work."""


def sequences_per_pass(seq_len: int) -> int:
    """How many sequences the teacher sees at once."""
    return max(1, PASS_TOKENS // seq_len)


def require_caching_memory(teacher: Shape, split: Split, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a teacher whose passes cannot fit.

    Raises:
        ResourceError: with what would help.
    """
    seq_len = split.tokens.shape[1]
    tokens = sequences_per_pass(seq_len) * seq_len
    width = 8 * teacher["hidden"] + 4 * teacher.inner  # of one layer: nothing is kept for a backward pass
    parts = {
        "teacher": dtype.itemsize * teacher.params,
        "activations": tokens * width * dtype.itemsize,
        "logits chunk": logits_bytes(tokens, teacher["vocab"], device),
    }
    require_memory(parts, device, "use a smaller teacher, --dtype bfloat16, or a device with more memory")


def record_starts(split: Split, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first record of each sequence, and the count of all, (sequences + 1,); the first token is never a target."""
    counts = np.full(len(rows), split.tokens.shape[1] - 1, np.int64)
    if split.mask is not None:
        for part in parts(len(rows), 4096):
            counts[part] = split.targets(rows[part].tolist())[:, 1:].sum(1)
    return np.concatenate([[0], np.cumsum(counts)])


@torch.no_grad()
def likeliest_words(lesson: Lesson, k: int, vocab: int, temperature: float) -> TopK:
    """The k likeliest of the first `vocab` words, at a temperature, chunk by chunk."""
    most = chunk_tokens(len(lesson.hidden), lesson.head.vocab, lesson.hidden.device)
    buffer = lesson.head.buffer(most)
    found = []
    for chunk in parts(len(lesson.hidden), most):
        logits = lesson.head.into(buffer, lesson.hidden[chunk])[:, :vocab]
        for rows in parts(len(logits), block_tokens(vocab, logits.device)):
            found.append(top_k(_log_probs(logits[rows], temperature), k))
    if not found:
        return TopK(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0), vocab)
    return TopK(
        torch.cat([top.ids for top in found]),
        torch.cat([top.log_probs for top in found]),
        torch.cat([top.log_tail for top in found]),
        vocab,
    )


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def write_cache(
    output: StageOutput, content: Content, teacher: Teacher, split: Split, rows: npt.NDArray[np.int64],
    device: torch.device,
) -> None:  # fmt: skip
    """Write and commit the cache of some sequences, in their order, continuing where a killed run was.

    Raises:
        RunError: the teacher's logits are not finite, or the disk filled up; what is written is kept.
    """
    starts, record = record_starts(split, rows), content.record
    size = sequences_per_pass(split.tokens.shape[1])
    with output, (output.partial / RECORDS).open("ab") as stream:
        done = _resume(output.partial, starts, record.nbytes)
        saved = time.monotonic()
        with Progress("cache teacher", len(rows), "sequences", start=done, rate_unit="tokens") as progress:
            for first in range(done, len(rows), size):
                batch = Batch.read(read_rows(split, rows[first : first + size].tolist()), device)
                top = likeliest_words(teacher.lesson(batch), content.top_k, content.vocab, content.temperature)
                stream.write(record.encode(top).tobytes())
                if time.monotonic() - saved >= SAVE_SECONDS:
                    stream.flush()
                    os.fsync(stream.fileno())
                    write_json(output.partial / STATE, {"sequences": first + len(batch.rows)})
                    saved = time.monotonic()
                progress.advance(len(batch.rows), rated=batch.ids.numel())
        stream.flush()
        save_file({"rows": rows, "starts": starts}, output.partial / INDEX)
        sizes = {"sequences": len(rows), "records": int(starts[-1]), "bytes_per_record": record.nbytes}
        output.commit({"out": str(output.out), **sizes})


def _resume(partial: Path, starts: npt.NDArray[np.int64], nbytes: int) -> int:
    """Sequences known to be on disk; cuts off whatever follows them."""
    try:
        done = int(json.loads((partial / STATE).read_text("utf-8"))["sequences"])
    except FileNotFoundError:
        done = 0
    os.truncate(partial / RECORDS, int(starts[done]) * nbytes)
    if done:
        say(f"The cache resumes at sequence {done} of {len(starts) - 1}.")
    return done
