"""Whole numbers of any width, bit after bit: value i of a row takes bits [i * bits, (i + 1) * bits), lowest first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST_BITS = 25
"""A value that starts anywhere in a byte then ends within four."""


def bits_for(count: int) -> int:
    """The width that holds 0 to count - 1."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` values."""
    return -(-count * bits // 8)


def pack(values: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """(rows, count) values below 2 ** bits to (rows, packed_bytes(count, bits))."""
    assert bits <= MOST_BITS
    octets = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(*values.shape, 4)
    digits = np.unpackbits(octets, axis=-1, count=bits, bitorder="little")
    return np.packbits(digits.reshape(len(values), values.shape[1] * bits), axis=-1, bitorder="little")


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint32]:
    """What `pack` was given: each value cut out of the four bytes from where it starts."""
    first = np.arange(count) * bits
    padded = np.zeros((len(packed), packed.shape[1] + 3), np.uint8)
    padded[:, : packed.shape[1]] = packed
    four = np.take(padded, (first // 8)[:, None] + np.arange(4), axis=1)
    words = np.ascontiguousarray(four).view("<u4")[:, :, 0].astype(np.uint32, copy=False)
    return (words >> (first % 8).astype(np.uint32)) & np.uint32((1 << bits) - 1)
