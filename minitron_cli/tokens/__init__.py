"""The prepared data set: fixed-length token sequences on disk, read through memory maps.

A directory written by `data prepare` holds, per split ("train", "validation"):
    SPLIT.tokens     raw little-endian token ids (uint16 when the vocabulary fits, else uint32), (sequences, seq_len)
    SPLIT.mask       uint8 of the same shape, 1 where the token is a training target; only for chat data
    dataset.json     seq_len, dtype, tokenizer identity, counts per split
"""

from minitron_cli.tokens.identity import tokenizer_identity
from minitron_cli.tokens.order import batch_rows
from minitron_cli.tokens.reader import Split, TokenDataset, is_prepared
from minitron_cli.tokens.stream import PreparedSource, Sequences, Source, read_rows
from minitron_cli.tokens.writer import SplitWriter, write_index

__all__ = [
    "PreparedSource",
    "Sequences",
    "Source",
    "Split",
    "SplitWriter",
    "TokenDataset",
    "batch_rows",
    "is_prepared",
    "read_rows",
    "tokenizer_identity",
    "write_index",
]
