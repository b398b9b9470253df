"""Which sequences make up a batch: a pure function of (seed, step), so that any run can resume or be repeated."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, sequences: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(sequences)


def batch_rows(seed: int, step: int, batch_size: int, sequences: int) -> list[int]:
    """Rows of the batch of one step: (batch_size,) indices into `sequences`.

    Each pass over the data is a fresh permutation; a batch may straddle two passes.
    """
    first = step * batch_size
    rows = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, sequences)
        rows.append(int(_permutation(seed, epoch, sequences)[offset]))
    return rows
