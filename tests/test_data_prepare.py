"""`data prepare`: every kind of source, the split, the mix, chats, limits, errors, repeatability."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import SHARED
from helpers_tokenizer import CHATML, CHATML_MARKED, make_tokenizer

from minitron_cli.config.data import DataConfig
from minitron_cli.data import readers, stdlib
from minitron_cli.data.chat import ChatRenderer
from minitron_cli.data.documents import Document, SplitRule
from minitron_cli.data.prepare import DataResult, run_data
from minitron_cli.data.sources import file_documents, open_sources, parse_weight
from minitron_cli.data.tokenise import Encoder, encode_all, thread_pool
from minitron_cli.errors import CheckpointError, ConfigError, InputError, OutputError, ResourceError, UserError
from minitron_cli.tokens import TokenDataset

BOS = 0


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    """A directory with a tokenizer."""
    make_tokenizer(tmp_path / "tok")
    return tmp_path / "tok"


def prepare(tmp_path: Path, *sources: Path | str, out: str = "out", **options: Any) -> DataResult:
    """run_data with small defaults; the tokenizer is tmp_path/tok."""
    values: dict[str, Any] = {"tokenizer": str(tmp_path / "tok"), "seq_len": 8, "validation": 0.0, "workers": 1}
    words = tuple(str(source) for source in sources)
    return run_data(DataConfig(sources=words, out=tmp_path / out, **{**values, **options}))


def ids_of(tmp_path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    return list(tokenizer.encode(text, add_special_tokens=False))


def stream(out: Path, split: str = "train") -> list[int]:
    """All tokens of a split, in order."""
    return [int(token) for token in TokenDataset(out).split(split).tokens.ravel()]


def documents(out: Path, tokenizer: Path, split: str = "train") -> list[str]:
    """The texts between separators; the last is usually cut."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    found: list[list[int]] = []
    for token in stream(out, split):
        if token == BOS:
            found.append([])
        else:
            found[-1].append(token)
    return [loaded.decode(ids) for ids in found]


def write_rows(path: Path, texts: list[str | None], column: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as sink:
            sink.write(lines.encode())
    elif path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), column: texts})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        path.write_text(lines)
    return path


def write_tree(root: Path, count: int = 60) -> Path:
    for i in range(count):
        path = root / f"d{i % 3}" / f"f{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4))
    return root


# --- packing ---------------------------------------------------------------------------------------------------------


def test_rows_are_separator_and_ids_document_by_document(tmp_path: Path, tok: Path) -> None:
    texts = [f"the quick fox number {i} é" for i in range(20)]
    result = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", texts))
    expected = [token for text in texts for token in [BOS, *ids_of(tmp_path, text)]]
    whole = len(expected) // 8 * 8
    assert stream(result.out) == expected[:whole]
    assert result.tokens == whole and result.sequences == whole // 8 and result.documents == 20
    train = result.splits["train"]
    assert train["tokens_seen"] == len(expected)
    assert train["bytes_seen"] == sum(len(text.encode()) for text in texts)
    counts = {"tokens": whole, "sequences": whole // 8, "documents": 20}
    assert result.to_json() == {"out": str(result.out), **counts, "splits": {"train": dict(train)}}
    index = TokenDataset(result.out).index
    assert index["separator"] == BOS and index["sources"][0]["kind"] == "jsonl"


def test_separator_is_eos_without_bos_and_nothing_without_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["the fox " * 8, "the dog " * 8])
    make_tokenizer(tmp_path / "tok", bos=None)
    assert stream(prepare(tmp_path, path).out)[0] == 1
    make_tokenizer(tmp_path / "tok", bos=None, eos=None)
    bare = prepare(tmp_path, path, out="bare")
    plain = ids_of(tmp_path, "the fox " * 8) + ids_of(tmp_path, "the dog " * 8)
    assert stream(bare.out) == plain[: bare.tokens]
    assert "packed without a separator" in capsys.readouterr().err


def test_what_the_tokenizer_adds_or_truncates_for_prompts_is_not_in_the_data(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer(tmp_path / "plain").backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(5)
    backend.enable_padding(length=64)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "tok"
    )
    result = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", ["the lazy dog and the fox " * 5] * 4))
    assert Counter(stream(result.out))[BOS] <= 4
    assert 1 not in stream(result.out)
    assert result.splits["train"]["tokens_seen"] > 4 * 20


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_row_files_give_the_same_tokens(tmp_path: Path, tok: Path, name: str) -> None:
    texts = ["the quick fox", None, "", "  ", "jumps over", "the lazy dog\n\nagain", "and more of it"]
    result = prepare(tmp_path, write_rows(tmp_path / name, texts), seq_len=2)
    kept = [text for text in texts if text and text.strip()]
    expected = [token for text in kept for token in [BOS, *ids_of(tmp_path, text)]]
    assert stream(result.out) == expected[: len(expected) // 2 * 2]
    assert result.documents == 4


def test_text_files_split_as_the_help_says(tmp_path: Path, tok: Path) -> None:
    body = "first line\nsecond line\n\n \nthird\n\n\n\nfourth"
    (tmp_path / "a.txt").write_text(body)
    (tmp_path / "a.md").write_text(body)
    expected = {
        ("a.txt", "auto"): ["first line\nsecond line", "third", "fourth"],
        ("a.md", "auto"): [body],
        ("a.txt", "file"): [body],
        ("a.md", "blank-line"): ["first line\nsecond line", "third", "fourth"],
        ("a.txt", "line"): ["first line", "second line", "third", "fourth"],
    }
    for number, ((name, mode), texts) in enumerate(expected.items()):
        result = prepare(tmp_path, tmp_path / name, out=f"o{number}", seq_len=2, split_documents=mode)
        found = documents(result.out, tok)
        assert result.documents == len(texts)
        assert found[:-1] == texts[:-1] and texts[-1].startswith(found[-1][:3])


def test_byte_order_mark_is_dropped_and_line_ends_stay(tmp_path: Path, tok: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    assert list(readers.text_blocks(tmp_path / "a.py")) == ["x = 1\r\ny = 2\r\n"]
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert list(readers.paragraphs(tmp_path / "a.txt")) == ["one\r\ntwo\r", "three\r"]


def test_directory_is_read_recursively_without_hidden_or_binary_files(
    tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tree(tmp_path / "src", 9)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    result = prepare(tmp_path, root)
    assert result.documents == 9
    assert "secret" not in "".join(documents(result.out, tok))
    assert "reading 9 text files; 1 binary files are left out" in capsys.readouterr().err


def test_directory_with_data_files_is_rows(tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    write_rows(root / "data" / "b.parquet", ["the dog " * 4])
    write_rows(root / "data" / "a.jsonl", ["the fox " * 4])
    (root / "README.md").write_text("a data set card")
    result = prepare(tmp_path, root, seq_len=2)
    assert [text[:7] for text in documents(result.out, tok)] == ["the fox", "the dog"]
    assert "reading 2 data files; 1 other files are left out" in capsys.readouterr().err


def test_hub_data_set_is_streamed(tmp_path: Path, tok: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = write_rows(tmp_path / "rows.parquet", ["the fox jumps", "over the dog"], "content")
    real, calls = datasets.load_dataset, []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        calls.append((name, subset, options))
        return real("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = prepare(tmp_path, "owner/name", seq_len=2, text_column="content", subset="en", hub_split="train")
    assert documents(result.out, tok)[0] == "the fox jumps"
    assert calls == [("owner/name", "en", {"split": "train", "streaming": True})]
    with pytest.raises(
        InputError, match="owner/name has no column 'text', only content, id; choose with --text-column"
    ):
        prepare(tmp_path, "owner/name", out="other")


def test_saved_data_set_is_read_from_disk(tmp_path: Path, tok: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["the fox jumps", "over the dog"]})
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert documents(prepare(tmp_path, tmp_path / "saved", seq_len=2).out, tok)[0] == "the fox jumps"
    result = prepare(tmp_path, tmp_path / "saved", out="test", seq_len=2, hub_split="test")
    assert result.documents == 1
    with pytest.raises(InputError, match="has no split 'dev', only test, train"):
        prepare(tmp_path, tmp_path / "saved", out="dev", hub_split="dev")


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_rule_is_the_hash_of_the_key() -> None:
    rule = SplitRule(40)
    keys = [f"package/module_{i}.py" for i in range(4000)]
    chosen = [key for key in keys if rule.is_validation(key)]
    assert chosen == [key for key in keys if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 40 == 0]
    assert 60 < len(chosen) < 140
    assert not any(SplitRule(0).is_validation(key) for key in keys)


def test_files_split_by_relative_path_rows_by_text(tmp_path: Path, tok: Path) -> None:
    root = write_tree(tmp_path / "src")
    result = prepare(tmp_path, root, validation=0.25)
    rule = SplitRule(4)
    wanted = sum(rule.is_validation(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    assert result.splits["validation"]["documents"] == wanted > 0
    assert result.splits["train"]["documents"] == 60 - wanted

    texts = [f"row number {i % 25} of the set" for i in range(100)]
    rows = prepare(tmp_path, write_rows(tmp_path / "rows.jsonl", texts), out="rows", validation=0.25, seq_len=2)
    train, held = (set(documents(rows.out, tok, split)[:-1]) for split in ("train", "validation"))
    assert train and held and not train & held
    assert held <= {text for text in texts if rule.is_validation(text)}


def test_validation_off_and_validation_too_small(tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["the fox jumps over the dog " * 9])
    assert list(prepare(tmp_path, path).splits) == ["train"]
    assert not (tmp_path / "out" / "validation.tokens").exists()
    result = prepare(tmp_path, path, out="two", validation=0.025)
    assert result.splits["validation"]["sequences"] == 0
    assert "Validation holds no whole sequence" in capsys.readouterr().err


# --- order, mix, limits ----------------------------------------------------------------------------------------------


def tree_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "minitron.json"}


def test_same_bytes_whatever_the_workers(tmp_path: Path, tok: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_cli.data.tokenise.BATCH_CHARACTERS", 200)  # many batches in flight
    root = write_tree(tmp_path / "src")
    rows = write_rows(tmp_path / "rows.parquet", [f"the dog number {i}" * 3 for i in range(50)])
    options: dict[str, Any] = {"validation": 0.1, "max_tokens": 1500}
    words = (f"{root}@0.5", f"{rows}@0.5")
    outputs = [prepare(tmp_path, *words, out=f"w{n}", workers=n, **options).out for n in (1, 2, 5, 0)]
    assert all(tree_bytes(out) == tree_bytes(outputs[0]) for out in outputs)


def test_seed_shuffles_files_and_leaves_rows(tmp_path: Path, tok: Path) -> None:
    root = write_tree(tmp_path / "src", 12)
    first, second = (prepare(tmp_path, root, out=f"s{seed}", seed=seed).out for seed in (1, 2))
    assert stream(first) != stream(second)
    assert sorted(documents(first, tok)[:-1])[3:-3] != documents(first, tok)[3:-4]
    rows = write_rows(tmp_path / "rows.jsonl", [f"row {i}" for i in range(30)])
    first, second = (prepare(tmp_path, rows, out=f"r{seed}", seed=seed).out for seed in (1, 2))
    assert stream(first) == stream(second)


def test_weights_are_shares_of_train_tokens(tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = write_rows(tmp_path / "long.jsonl", [f"the long dog {i} " * 6 for i in range(400)])
    short = write_rows(tmp_path / "short.jsonl", [f"a fox {i}" for i in range(400)])
    result = prepare(tmp_path, f"{long}@3", f"{short}@1", validation=0.1)
    given = TokenDataset(result.out).index["sources"]
    total = sum(source["train_tokens"] for source in given)
    assert abs(given[0]["train_tokens"] / total - 0.75) < 0.01
    assert "short.jsonl is used up after" in capsys.readouterr().err
    assert given[1]["documents"] == 400 > given[0]["documents"]


def test_without_weights_everything_is_read_in_turn(
    tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_rows(tmp_path / f"{n}.jsonl", [f"{n} row {i}" for i in range(20)]) for n in "ab")
    found = documents(prepare(tmp_path, a, b, seq_len=2).out, tok)
    assert [text[0] for text in found] == ["a"] * 20 + ["b"] * 20
    prepare(tmp_path, a, b, out="short", max_tokens=16)
    assert f"--max-tokens was reached before {b}" in capsys.readouterr().err


def test_weight_syntax(tmp_path: Path) -> None:
    assert parse_weight("owner/name@0.3") == ("owner/name", 0.3)
    assert parse_weight("./a@b.txt") == ("./a@b.txt", None)
    odd = tmp_path / "file@2"
    odd.write_text("x")
    assert parse_weight(str(odd)) == (str(odd), None)
    assert parse_weight(f"{odd}@2") == (str(odd), 2.0)
    for word in ("a@0", "a@-1", "a@nan", "a@inf"):
        with pytest.raises(ConfigError, match=f"{word}: the weight after @ must be a positive number"):
            parse_weight(word)


@pytest.mark.parametrize("limit", [8, 100, 804])
def test_max_tokens_ends_the_train_split(tmp_path: Path, tok: Path, limit: int) -> None:
    path = write_rows(tmp_path / "a.jsonl", [f"the quick fox number {i}" for i in range(500)])
    whole = stream(prepare(tmp_path, path, out="whole").out)
    result = prepare(tmp_path, path, max_tokens=limit)
    train = result.splits["train"]
    assert train["tokens_seen"] == limit and train["tokens"] == limit // 8 * 8
    assert stream(result.out) == whole[: train["tokens"]]
    ratio = TokenDataset(result.out).split("train").bytes_per_token
    assert abs(ratio - TokenDataset(tmp_path / "whole").split("train").bytes_per_token) < 0.5


def test_max_tokens_of_a_directory_leaves_it_a_validation_split(tmp_path: Path, tok: Path) -> None:
    root = write_tree(tmp_path / "src", 400)
    whole = prepare(tmp_path, root, out="whole", validation=0.05, seq_len=4)
    result = prepare(tmp_path, root, validation=0.05, seq_len=4, max_tokens=400)
    assert result.splits["train"]["tokens_seen"] == 400
    held, cap = result.splits["validation"]["tokens_seen"], 64 * 4
    assert cap <= held < cap + 200
    assert stream(result.out, "validation") == stream(whole.out, "validation")[: result.splits["validation"]["tokens"]]


# --- chat ------------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is the answer?"},
    {"role": "assistant", "content": "the answer is é 42"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "nothing"},
]
WANTED = "the answer is é 42<|im_end|>nothing<|im_end|>"


def write_chats(path: Path, chats: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_mask_covers_what_the_assistant_wrote(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path / "tok", template=template)
    path = write_chats(tmp_path / "a.jsonl", [CHAT, [{"role": "user", "content": "alone"}], CHAT])
    result = prepare(tmp_path, path, messages="messages", seq_len=2)
    split = TokenDataset(result.out).split("train")
    assert result.documents == 2 and split.mask is not None
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokens, mask = split.tokens.ravel(), split.mask.ravel()
    length = len(tokenizer.encode(rendered, add_special_tokens=False)) + 1
    assert tokens[0] == BOS and mask[0] == 0
    assert tokenizer.decode(tokens[1:length]) == rendered
    assert tokenizer.decode(tokens[:length][mask[:length] == 1]) == WANTED
    assert result.splits["train"]["bytes_seen"] == 2 * len(rendered.encode())


def test_separator_is_not_doubled_nor_invented_for_chats(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok", template="{{ bos_token }}" + CHATML)
    path = write_chats(tmp_path / "a.jsonl", [CHAT] * 3)
    assert Counter(stream(prepare(tmp_path, path, messages="messages", seq_len=2).out))[BOS] == 3
    make_tokenizer(tmp_path / "tok", template=CHATML, bos=None)
    assert stream(prepare(tmp_path, path, out="two", messages="messages", seq_len=2).out)[0] == 2


def test_answer_that_shares_a_token_with_the_blank_before_it_counts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(tmp_path / "tok", template=template)
    chat = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the answer"}]
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer, "tok"))
    (item,) = encoder.encode([Document("", False, 0, "row 1", chat)])
    assert item.mask is not None
    assert tokenizer.decode(item.ids[item.mask == 1]).strip() == "the answer"


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    last = "{% if loop.last and message['role'] == 'assistant' %}[think]{% endif %}"
    template = CHATML.replace("{{ message['content'] }}", last + "{{ message['content'] }}")
    make_tokenizer(tmp_path / "tok", template=template)
    single = write_chats(tmp_path / "single.jsonl", [CHAT[1:3]] * 3)
    prepare(tmp_path, single, messages="messages", seq_len=2)
    many = write_chats(tmp_path / "many.jsonl", [CHAT])
    with pytest.raises(ConfigError, match=r"many\.jsonl:1: the chat template renders an assistant turn differently"):
        prepare(tmp_path, many, out="two", messages="messages", seq_len=2)


def test_chats_from_parquet(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok", template=CHATML)
    chat = [*CHAT, {"role": "user", "content": None, "name": "x"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT] * 4}), tmp_path / "a.parquet")
    jsonl = write_chats(tmp_path / "a.jsonl", [CHAT] * 4)
    outs = [prepare(tmp_path, p, out=p.suffix, messages="messages").out for p in (tmp_path / "a.parquet", jsonl)]
    assert stream(outs[0]) == stream(outs[1])
    with pytest.raises(InputError, match=r"b\.jsonl:1: a message of column 'messages' has keys role, name; each needs"):
        prepare(tmp_path, write_chats(tmp_path / "b.jsonl", [chat]), out="two", messages="messages")


# --- python-stdlib ---------------------------------------------------------------------------------------------------


def test_stdlib_is_clean_source_and_stays_inside() -> None:
    files = stdlib.stdlib_files()
    keys = [key for key, _ in files]
    root = Path(sysconfig.get_path("stdlib")).resolve()
    assert keys == sorted(keys) and len(set(keys)) == len(keys) > 200
    assert {"argparse.py", "json/decoder.py", "unittest/case.py", "turtledemo/clock.py"} <= set(keys)
    banned = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
    for key, path in files:
        assert path.resolve().is_relative_to(root) and path.suffix == ".py"
        assert not banned & set(Path(key).parts)
        assert path.stat().st_size <= 400_000
    assert not {"pydoc_data/topics.py", "keyword.py", "token.py", "stringprep.py"} & set(keys)
    assert not any("_sysconfigdata" in key for key in keys)


def test_stdlib_ignores_links_to_elsewhere_and_generated_heads(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    (root / "good.py").write_text("\n" * 9 + "# auto-generated: no, only mentioned\nx = 1\n")
    (root / "made.py").write_text('"""Tables."""\n# Auto-generated by tool.py\n')
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (root / "big.py").write_text("x = 1\n" * 80_000)
    (root / "test" / "test_x.py").write_text("x = 1\n")
    (tmp_path / "outside.py").write_text("secret = 1\n")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    assert [key for key, _ in stdlib.stdlib_files(root)] == ["good.py"]
    with pytest.raises(InputError, match="this Python has no library source"):
        stdlib.stdlib_files(tmp_path / "nothing")


def test_stdlib_leaks_nothing_between_splits(tmp_path: Path, tok: Path) -> None:
    config = DataConfig(sources=("python-stdlib",), tokenizer=str(tok), out=tmp_path / "out", validation=0.025)
    (source,) = open_sources(config)
    held = {Path(d.where) for d in source.documents() if d.validation}
    train = {Path(d.where) for d in source.documents() if not d.validation}
    root = Path(sysconfig.get_path("stdlib"))
    assert held and not held & train
    for path in held:
        key = path.relative_to(root).as_posix()
        assert int(hashlib.sha256(key.encode()).hexdigest(), 16) % 40 == 0
    assert len(held) + len(train) == len(stdlib.stdlib_files())


@pytest.mark.shared_data
def test_shipped_teacher_tokenizer_on_the_stdlib(tmp_path: Path) -> None:
    config = DataConfig(
        sources=("python-stdlib",), tokenizer=str(SHARED / "models" / "tiny-py"), out=tmp_path / "out", seq_len=128,
        max_tokens=50_000,
    )  # fmt: skip
    result = run_data(config)
    assert result.splits["train"]["tokens_seen"] == 50_000
    assert result.splits["validation"]["sequences"] >= 64
    assert 2.5 < TokenDataset(result.out).split("train").bytes_per_token < 4


# --- idempotence and errors ------------------------------------------------------------------------------------------


def test_second_run_is_up_to_date_until_something_changes(
    tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [f"the fox {i}" for i in range(40)])
    first = prepare(tmp_path, path)
    before = {p.name: p.stat().st_mtime_ns for p in first.out.iterdir()}
    assert prepare(tmp_path, path, workers=3) == first
    assert {p.name: p.stat().st_mtime_ns for p in first.out.iterdir()} == before
    assert "is up to date" in capsys.readouterr().err
    for change in ({"seq_len": 4}, {"seed": 1}, {"validation": 0.1}):
        with pytest.raises(OutputError, match="add --force"):
            prepare(tmp_path, path, **change)
    make_tokenizer(tmp_path / "tok", vocab=300)
    with pytest.raises(OutputError, match="add --force"):
        prepare(tmp_path, path)
    write_rows(path, ["the dog " * 30])
    assert prepare(tmp_path, path, force=True).documents == 1


def bad_inputs(root: Path) -> Iterator[tuple[list[str], dict[str, Any], str]]:
    """Sources, options, and the sentence they earn."""

    def put(name: str, content: bytes) -> str:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    good = put("good.jsonl", b'{"text": "the fox jumps over the dog and more"}\n')
    yield [f"{root}/none.txt"], {}, "none.txt does not exist; give a file"
    yield ["corpus.txt"], {}, "corpus.txt does not exist; give a file"
    yield ["a/b/c"], {}, "a/b/c does not exist; give a file"
    yield ["not an id"], {}, "not an id is neither an existing path nor a Hub data set id (owner/name)."
    yield ["owner/name"], {}, "owner/name is not an existing path, and the Hub gives no such data set:"
    yield [put("bad.txt", b"good line\nbad \xff line\n")], {}, "bad.txt is not UTF-8 text: byte 14 cannot be decoded"
    yield [put("cut.txt", b"abc \xe2\x82")], {}, "cut.txt is not UTF-8 text: byte 4 cannot be decoded"
    yield [put("bin.txt", b"a\0b")], {}, "bin.txt is a binary file"
    yield [put("tree/bad.txt", b"ok\n\xff") and f"{root}/tree"], {}, "tree/bad.txt is not UTF-8 text: byte 3"
    yield [put("broken.jsonl", b'{"text": "a"}\n\n{"text": \n')], {}, "broken.jsonl:3: broken JSON"
    yield [put("array.json", b'[{"text": "a"}]\n')], {}, "array.json:1: holds a JSON list, not an object"
    yield [put("pretty.json", b'{\n "text": "a"\n}\n')], {}, "`jq -c '.[]'` converts an array"
    yield [put("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')], {}, "latin.jsonl:2: not UTF-8 text at byte 10"
    yield [put("half.jsonl", b'{"text": "a \\ud800"}\n')], {}, "half.jsonl:1: character 2 is half a surrogate pair"
    yield [put("type.jsonl", b'{"text": 5}\n')], {}, "type.jsonl:1: column 'text' holds int, not text."
    yield (
        [put("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9])],
        {},
        "cut.jsonl.gz cannot be read after line",
    )
    yield [put("cut.parquet", b"PAR1 nothing")], {}, "cut.parquet is not a whole Parquet file"
    yield [good], {"text_column": "body"}, "good.jsonl has no column 'body', only text; choose with --text-column"
    late = put("late.jsonl", b'{"text": "a"}\n{"body": "b"}\n')
    yield [late], {}, "late.jsonl:2 has no column 'text', only body"
    yield [put("empty.jsonl", b"")], {}, "empty.jsonl: no text."
    yield [put("blank.txt", b"\n \n")], {}, "blank.txt: no text."
    yield [good], {"seq_len": 4096}, "train tokens are less than one sequence of 4096 (--seq-len)"
    yield [good, f"{good}@0.5"], {}, "good.jsonl has no weight but"
    yield [good], {"seq_len": 64, "max_tokens": 10}, "--max-tokens 10 is less than one sequence (--seq-len 64)."
    yield [good], {"validation": 0.7}, "--validation: Input should be less than or equal to 0.5 (got 0.7)."
    yield [], {}, "data prepare needs at least one SOURCE"
    yield [put("a.txt", b"text")], {"messages": "chat"}, "has no chat template; use the instruct model's tokenizer"
    (root / "hollow").mkdir()
    yield [f"{root}/hollow"], {}, "hollow is a directory without files."
    yield [put("pics/a.png", b"\0\0") and f"{root}/pics"], {}, "pics holds no text: its 1 files are binary."
    yield [str(root)], {"out": root / "out"}, "lies inside the source"
    yield [os.devnull], {}, "/dev/null is neither a file nor a directory."
    key = next(text for text in (f"text {i}" for i in range(99)) if SplitRule(2).is_validation(text))
    held = put("held.jsonl", json.dumps({"text": key}).encode())
    yield [held], {"validation": 0.5}, "all 1 documents fell to validation"


def test_every_error_is_one_sentence_and_leaves_nothing(tmp_path: Path, tok: Path) -> None:
    root = tmp_path / "inputs"
    root.mkdir()
    for sources, options, sentence in bad_inputs(root):
        values = {"tokenizer": str(tok), "seq_len": 8, "validation": 0.0, "out": tmp_path / "out", **options}
        with pytest.raises(UserError) as caught:
            run_data(DataConfig(sources=tuple(sources), **values))
        assert sentence in str(caught.value), (sentence, str(caught.value))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*")), sentence


def test_chat_errors(tmp_path: Path) -> None:
    make_tokenizer(
        tmp_path / "tok", template="{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    )
    path = write_chats(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(InputError, match=r"a\.jsonl:1: the chat template refuses this conversation: too many\."):
        prepare(tmp_path, path, messages="messages")
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(ConfigError, match=r"--messages needs rows with columns .*a\.txt is plain text"):
        prepare(tmp_path, tmp_path / "a.txt", messages="messages")
    with pytest.raises(InputError, match="no conversation with an assistant turn"):
        prepare(tmp_path, write_chats(tmp_path / "b.jsonl", [CHAT[:2]]), messages="messages")
    with pytest.raises(InputError, match=r"c\.jsonl:1: column 'messages' is not a list of messages"):
        prepare(tmp_path, write_chats(tmp_path / "c.jsonl", ["hello"]), messages="messages")
    assert not list(tmp_path.glob("out*"))


def test_unreadable_file_and_full_disk(tmp_path: Path, tok: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["the fox"])
    monkeypatch.setattr("minitron_cli.data.sources.os.access", lambda *_: False)
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read: permission denied"):
        prepare(tmp_path, path)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ResourceError, match=r"The prepared data needs .* GB of disk"):
        prepare(tmp_path, path)
    assert not list(tmp_path.glob("out*"))


def test_prepared_directory_is_no_source(tmp_path: Path, tok: Path) -> None:
    first = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", ["the fox jumps " * 9]))
    with pytest.raises(InputError, match="is prepared already"):
        prepare(tmp_path, first.out, out="two")


def test_tokenizer_errors(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{broken")
    cases = {
        "/nowhere": "/nowhere does not exist",
        str(tmp_path / "bare"): "bare holds no tokenizer files; give a directory with tokenizer.json.",
        str(tmp_path / "broken"): "broken: transformers cannot load its tokenizer:",
        "owner/name": "owner/name is not a local path, and the Hub did not answer",
    }
    for reference, sentence in cases.items():
        with pytest.raises(CheckpointError) as caught:
            prepare(tmp_path, path, tokenizer=reference)
        assert sentence in str(caught.value)


def test_long_sequences_are_only_a_notice(tmp_path: Path, tok: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tok / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4}')
    prepare(tmp_path, write_rows(tmp_path / "a.jsonl", ["the fox jumps " * 9]))
    assert "--seq-len 8 is more than the 4 positions that" in capsys.readouterr().err


# --- memory ----------------------------------------------------------------------------------------------------------


def test_reading_runs_only_a_few_batches_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron_cli.data.tokenise.BATCH_DOCUMENTS", 5)
    encoder = Encoder(make_tokenizer(tmp_path / "tok"))
    taken = 0

    def endless() -> Iterator[Document]:
        nonlocal taken
        while True:
            taken += 1
            yield Document("the fox", False, 0, "")

    with thread_pool(2) as (pool, ahead):
        items = encode_all(endless(), encoder, pool, ahead)
        for done in range(1, 200):
            next(items)
            assert taken <= done + 5 * (ahead + 1)


def test_large_files_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    text = "".join(f"line {i} with é and €\n" for i in range(200)) + "€" * 300
    path = tmp_path / "a.txt"
    path.write_text(text)
    blocks = list(readers.text_blocks(path))
    assert "".join(blocks) == text and max(map(len, blocks)) <= 128
    assert list(readers.paragraphs(path)) != [text]
    assert "".join(part.replace("\n", "") for part in readers.paragraphs(path)) == text.replace("\n", "")
    found = list(file_documents([("a.txt", path)], "file", SplitRule(0), 0))
    assert len(found) == len(blocks) and len({document.validation for document in found}) == 1


def test_parquet_is_decoded_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def spy(self: Any, size: int, **options: Any) -> Iterator[Any]:
        for batch in real(self, size, **options):
            sizes.append((batch.num_rows, batch.num_columns))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["row"] * 2000, "other": np.zeros(2000)}), tmp_path / "a.parquet"
    )
    assert sum(1 for _ in readers.parquet_rows(tmp_path / "a.parquet", "text")) == 2000
    assert max(sizes) <= (readers.PARQUET_ROWS, 1)
