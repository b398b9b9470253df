"""The packed format: what SplitWriter writes, TokenDataset reads; the order of batches; identities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_tokenizer import make_tokenizer

from minitron_cli.errors import InputError
from minitron_cli.tokens import SplitWriter, TokenDataset, batch_rows, tokenizer_identity, write_index
from minitron_cli.tokens.writer import token_dtype


def write(
    directory: Path, documents: list[list[int]], *, seq_len: int = 4, vocab: int = 100, mask: bool = False
) -> None:
    writer = SplitWriter(directory, "train", seq_len, vocab, masked=mask)
    for ids in documents:
        writer.add(ids, len(ids) * 3, [i % 2 for i in ids] if mask else None)
    write_index(
        directory, seq_len=seq_len, vocab_size=vocab, tokenizer="abc", masked=mask, splits={"train": writer.close()}
    )


def test_rows_are_the_concatenation_of_the_documents(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [], list(range(5, 15)), [15, 16]]
    write(tmp_path, documents)
    split = TokenDataset(tmp_path).split("train")
    flat = [token for document in documents for token in document]
    assert split.tokens.ravel().tolist() == flat[:16]
    assert len(split) == 4
    assert split.rows([3, 0]).tolist() == [flat[12:16], flat[:4]]
    assert split.targets([0]).all()
    assert split.bytes_per_token == 3.0


def test_mask_travels_with_its_tokens(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5, 6, 7, 8, 9]], mask=True)
    split = TokenDataset(tmp_path).split("train")
    assert (split.targets([0, 1]) == (split.rows([0, 1]) % 2 == 1)).all()


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (151_936, "uint32")]
)
def test_smallest_type_that_holds_the_largest_id(tmp_path: Path, vocab: int, dtype: str) -> None:
    assert token_dtype(vocab) == dtype
    write(tmp_path, [[vocab - 1] * 4], vocab=vocab)
    assert TokenDataset(tmp_path).split("train").rows([0]).tolist() == [[vocab - 1] * 4]


def test_reader_refuses_what_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; run `minitron data prepare` first\."):
        TokenDataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a prepared data set"):
        TokenDataset(tmp_path)
    write(tmp_path, [[1] * 9])
    with pytest.raises(InputError, match="has no split 'validation'; it has train"):
        TokenDataset(tmp_path).split("validation")
    (tmp_path / "train.tokens").write_bytes(b"1234567")
    with pytest.raises(InputError, match="should hold 16 bytes; it is damaged"):
        TokenDataset(tmp_path).split("train")
    index = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(InputError, match="data format 99"):
        TokenDataset(tmp_path)


def test_split_without_a_whole_sequence_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2]])
    with pytest.raises(InputError, match="no whole sequence of 4 tokens; use more text or a smaller --seq-len"):
        TokenDataset(tmp_path).split("train")


def test_batches_visit_every_row_once_per_pass_and_depend_on_seed_and_step_alone() -> None:
    steps = [batch_rows(7, step, 3, 10) for step in range(20)]
    flat = [row for rows in steps for row in rows]
    for start in range(0, 60, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert [batch_rows(7, step, 3, 10) for step in (19, 3)] == [steps[19], steps[3]]
    assert [batch_rows(8, step, 3, 10) for step in range(20)] != steps
    # Two processes with half the batch each see the same rows as one with all of it.
    assert [row for step in range(10) for row in batch_rows(7, step, 6, 10)] == flat


def test_identity_follows_the_ids_and_nothing_else(tmp_path: Path) -> None:
    first = make_tokenizer(tmp_path / "a")
    same = make_tokenizer(tmp_path / "b", bos=None, template="{{ messages }}")
    other = make_tokenizer(tmp_path / "c", vocab=300)
    assert tokenizer_identity(first) == tokenizer_identity(same) != tokenizer_identity(other)
    first.backend_tokenizer.enable_truncation(5)
    assert tokenizer_identity(first) == tokenizer_identity(same)


def test_writer_memory_is_less_than_a_row_between_documents(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", 16, 100)
    for _ in range(50):
        writer.add(np.ones(1000, np.uint32), 1)
        assert len(writer._pending) < 16
    assert writer.close()["sequences"] == 3125
