"""Text tokenised while training runs: the order is that of a slow reference, every place can be gone back to."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import make_model
from helpers_chain import SMALL, make_checkpoint, make_data
from helpers_tokenizer import CHATML, make_tokenizer

from minitron_cli.config.data import DataConfig
from minitron_cli.config.distill import DistillConfig
from minitron_cli.data.documents import SplitRule
from minitron_cli.data.hub import by_shards
from minitron_cli.data.prepare import run_data
from minitron_cli.data.streaming import StreamedSource, StreamedText
from minitron_cli.distill.corpus import open_corpus
from minitron_cli.distill.loop import Run
from minitron_cli.distill.stage import run_distill
from minitron_cli.errors import ConfigError, InputError, RunError, UserError
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.runtime.ahead import Ahead
from minitron_cli.tokens import TokenDataset

TEXT = "the quick brown fox jumps over a lazy dog while many others sleep below old trees"
SEQ_LEN, BATCH, BLOCK = 16, 3, 5


def texts(count: int, seed: int) -> list[str]:
    """Sentences of different lengths; one is longer than a block of sequences."""
    generator = np.random.default_rng(seed)
    sizes = [*generator.integers(1, 40, count - 1), 2 * BLOCK * SEQ_LEN]
    return [" ".join(generator.choice(TEXT.split(), size)) + f" {number}" for number, size in enumerate(sizes)]


def write_jsonl(path: Path, rows: list[str]) -> None:
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_source(kind: str, path: Path) -> tuple[Path, list[list[str]]]:
    """A source of some kind, and the documents of each of its shards."""
    shards = [texts(14, seed) for seed in range(3)]
    if kind == "text file":
        file = path / "corpus.txt"
        file.write_text("\n\n".join(shards[0]))
        return file, shards[:1]
    for number, rows in enumerate(shards):
        if kind == "jsonl":
            write_jsonl(path / f"{number}.jsonl{'.gz' if number == 1 else ''}", rows)
        elif kind == "parquet":
            pq.write_table(pa.table({"text": rows, "other": rows[::-1]}), path / f"{number}.parquet", row_group_size=4)
        else:
            (path / f"{number}.py").write_text("\n".join(rows))
    return path, [["\n".join(rows)] for rows in shards] if kind == "directory" else shards


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


def streamed(source: Path, tokenizer: Path, share: float = 0.0, **options: Any) -> StreamedText:
    settings = {"sources": (str(source),), "tokenizer": str(tokenizer), "seq_len": SEQ_LEN, "out": Path("elsewhere")}
    text = StreamedText(DataConfig(**{**settings, "validation": share, **options}))
    text.block_sequences = BLOCK
    return text


def slow_rows(shards: list[list[str]], tokenizer: Path, seed: int, share: float = 0.0) -> Iterator[list[int]]:
    """The same order, in loops over whole passes."""
    loaded, rule = load_tokenizer(tokenizer), SplitRule(round(1 / share) if share else 0)
    turn = 0
    while True:
        ids: list[int] = []
        starts: list[tuple[int, int, int]] = []  # of each token: shard, document, token
        order = np.random.Generator(np.random.PCG64([seed, turn])).permutation(len(shards))
        for done, shard in enumerate(order):
            training = [text for text in shards[shard] if not rule.is_validation(text)]
            for number, text in enumerate(training):
                found = [loaded.bos_token_id, *loaded.encode(text, add_special_tokens=False)]
                ids += found
                starts += [(done, number, token) for token in range(len(found))]
        for first in range(0, len(ids) // SEQ_LEN, BLOCK):
            rows = min(BLOCK, len(ids) // SEQ_LEN - first)
            place = starts[first * SEQ_LEN]
            if place[2] == 0 and first:  # a block that ended with a document began to wait at that document's end
                done, number, token = starts[first * SEQ_LEN - 1]
                place = (done, number, token + 1)
            permuted = np.random.Generator(np.random.PCG64([seed, turn, *place])).permutation(rows)
            for row in permuted:
                begin = (first + int(row)) * SEQ_LEN
                yield ids[begin : begin + SEQ_LEN]
        turn += 1


KINDS = ["jsonl", "parquet", "directory", "text file"]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_slow_reference(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    """Over two passes and more, whatever the kind; every step can be gone back to by the state before it."""
    path, shards = make_source(kind, tmp_path)
    source = StreamedSource(streamed(path, tokenizer), seed=3, batch_size=BATCH)
    expected = slow_rows(shards, tokenizer, seed=3)
    per_pass = sum(len(load_tokenizer(tokenizer).encode(t)) + 1 for shard in shards for t in shard) // SEQ_LEN
    steps = 5 * per_pass // (2 * BATCH)
    states, batches = [source.state()], []
    for step in range(steps):
        batch = source.batch(step)
        assert batch.ids.tolist() == [next(expected) for _ in range(BATCH)], f"step {step}"
        assert batch.targets.all() and batch.rows == ()
        batches.append(batch.ids)
        states.append(json.loads(json.dumps(source.state())))
    source.close()
    assert max(len(json.dumps(state)) for state in states) < 100
    again = StreamedSource(streamed(path, tokenizer), seed=3, batch_size=BATCH)
    for step in sorted({1, steps // 3, steps // 2, steps - 2}):
        again.seek(step, states[step])
        assert (again.batch(step).ids == batches[step]).all()
        assert (again.batch(step + 1).ids == batches[step + 1]).all()
        assert again.state() == states[step + 2]
    again.close()


def test_passes_and_seeds_differ(tmp_path: Path, tokenizer: Path) -> None:
    path, _ = make_source("jsonl", tmp_path)
    text = streamed(path, tokenizer)

    def rows(seed: int, count: int) -> list[tuple[int, ...]]:
        source = StreamedSource(text, seed, batch_size=count)
        found = source.batch(0).ids
        source.close()
        return [tuple(row) for row in found.tolist()]

    assert rows(0, 12) == rows(0, 12) != rows(1, 12)


def test_train_and_validation_are_those_of_data_prepare(tmp_path: Path, tokenizer: Path) -> None:
    """One shard keeps its order but for the shuffling: the sequences of a pass are the prepared ones."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [f"{text} {number}" for number in range(6) for text in texts(14, number)])
    share, settings = 0.2, {"sources": (str(path),), "tokenizer": str(tokenizer), "seq_len": SEQ_LEN}
    run_data(DataConfig(**settings, validation=share, out=tmp_path / "prepared"))
    prepared = TokenDataset(tmp_path / "prepared")
    train, validation = prepared.split("train").tokens, prepared.split("validation")
    text = streamed(path, tokenizer, share)
    source = StreamedSource(text, 0, batch_size=len(train))
    assert sorted(source.batch(0).ids.tolist()) == sorted(train.tolist())
    source.close()
    kept = text.first_sequences(10_000, kept=True)
    assert kept is not None and kept.tokens.tolist() == validation.tokens.tolist()
    assert kept.bytes_per_token == pytest.approx(validation.bytes_per_token)
    first = text.first_sequences(2, kept=True)
    assert first is not None and first.tokens.tolist() == validation.tokens[:2].tolist()


def test_chat_masks(tmp_path: Path) -> None:
    """Only assistant turns are targets, as in prepared data, after the shuffling too."""
    make_tokenizer(tmp_path / "chat", template=CHATML)
    talks = [
        [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": f"the answer {number}"}]
        for number in range(40)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in talks))
    options = {"messages": "talk", "validation": 0.0}
    settings = {"sources": (str(path),), "tokenizer": str(tmp_path / "chat"), "seq_len": SEQ_LEN, **options}
    run_data(DataConfig(**settings, out=tmp_path / "prepared"))
    split = TokenDataset(tmp_path / "prepared").split("train")
    source = StreamedSource(streamed(path, tmp_path / "chat", **options), 0, len(split))
    batch = source.batch(0)
    source.close()
    pairs = zip(batch.ids.tolist(), batch.targets.tolist(), strict=True)
    assert split.mask is not None and not split.mask.all()
    assert sorted(pairs) == sorted(zip(split.tokens.tolist(), split.targets(range(len(split))).tolist(), strict=True))


def test_shards_of_a_hub_data_set(tmp_path: Path) -> None:
    """One after another they are the data set."""
    import datasets

    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", texts(4, number))
    files = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    cache = str(tmp_path / "cache")
    dataset = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=cache)
    shards = by_shards(dataset, "owner/name", "text")
    assert len(shards) == 3
    assert [row["text"] for shard in shards for _, row, _ in shard()] == [row["text"] for row in dataset]
    assert next(shards[2]())[0] == "owner/name shard 2 row 1"


def test_ahead_keeps_order_and_passes_errors_on() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number
        raise ValueError("broken")

    ahead = Ahead(numbers())  # type: ignore[arg-type]
    time.sleep(0.2)
    assert len(made) <= 2, "one waits, one is in the making"
    assert [ahead.take() for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            ahead.take()
    ahead.close()


def test_ahead_stops_when_closed() -> None:
    def forever() -> Iterator[int]:
        number = 0
        try:
            while True:
                yield number
                number += 1
        finally:
            ended.set()

    ended = threading.Event()
    ahead = Ahead(forever())  # type: ignore[arg-type]
    assert ahead.take() == 0
    ahead.close()
    assert ended.is_set()
    ended.clear()
    once = Ahead(item for item in (1,))
    assert once.take() == 1
    with pytest.raises(EOFError):
        once.take()


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Any]:
    """A teacher, and three shards to distil on."""
    checkpoint = str(make_checkpoint(tmp_path / "teacher"))
    (tmp_path / "rows").mkdir()
    make_source("jsonl", tmp_path / "rows")
    settings = {"student": checkpoint, "teacher": checkpoint, "data": tmp_path / "rows", "seq_len": SEQ_LEN}
    training = {"steps": 8, "batch_size": BATCH, "save_every": 2, "init": "random", "eval_sequences": 4}
    return {**settings, **training, "out": tmp_path / "out"}


def test_distil_on_a_stream_and_go_on_after_a_stop(
    chain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 5, resumed: the bytes of an undisturbed run."""
    val = {"val_data": make_data(tmp_path / "prepared", Path(chain["teacher"]))}
    undisturbed = run_distill(DistillConfig(**{**chain, **val, "out": tmp_path / "undisturbed"}))
    assert undisturbed.steps == 8 and undisturbed.tokens == 8 * BATCH * SEQ_LEN
    assert undisturbed.val_loss_after is not None and undisturbed.val_loss_before != undisturbed.val_loss_after
    real = Run.advance

    def stopping(self: Run) -> int:
        if self.step == 5:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Run, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_distill(DistillConfig(**chain, **val))
    monkeypatch.setattr(Run, "advance", real)
    result = run_distill(DistillConfig(**chain, **val))
    models = [(path / "model.safetensors").read_bytes() for path in (chain["out"], tmp_path / "undisturbed")]
    assert models[0] == models[1] and result.val_loss_after == undisturbed.val_loss_after
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
    assert not (chain["out"] / "state.data.json").exists()


def test_kill_and_resume_is_bit_identical(chain: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 after some checkpoint, the same run again."""
    settings = {**chain, "steps": 60, "save_every": 5, "eval_sequences": 2, "eval_every": 60}
    code = "import sys, json; from pathlib import Path; from minitron_cli import DistillConfig, run_distill\n"
    code += "run_distill(DistillConfig.from_mapping(json.loads(sys.argv[1])))"
    arguments = json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in settings.items()})
    process = subprocess.Popen([sys.executable, "-c", code, arguments], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not any((tmp_path / "out.partial").glob("state.step-*5.safetensors")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for out in ("out", "undisturbed"):
        run_distill(DistillConfig(**{**settings, "out": tmp_path / out}))
    models = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "undisturbed")]
    assert models[0] == models[1]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, config: DistillConfig) -> None:
    """Leave an interrupted run with checkpoints behind."""
    real = Run.advance

    def stopping(self: Run) -> int:
        if self.step == step:
            raise RunError("stopped")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", stopping)
        with pytest.raises(RunError, match="stopped"):
            run_distill(config)


def test_changed_data_does_not_throw_a_run_away(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = DistillConfig(**chain)
    stop_at(5, monkeypatch, config)
    kept = sorted(chain["out"].with_name("out.partial").iterdir())
    rows = chain["data"] / "0.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("quick", "slow"))
    with pytest.raises(InputError, match="has changed since the interrupted run"):
        run_distill(config)
    assert sorted(chain["out"].with_name("out.partial").iterdir()) == kept
    rows.write_text(before)
    assert run_distill(config).steps == 8


def test_other_text_behind_the_same_name_is_noticed(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing outside tells (a Hub data set), the sequences in use at the checkpoint do; the state is kept."""
    config = DistillConfig(**chain)
    real = StreamedText.__init__

    def nameless(self: StreamedText, settings: DataConfig) -> None:
        real(self, settings)
        self.fingerprint = "the name alone"

    monkeypatch.setattr(StreamedText, "__init__", nameless)
    stop_at(5, monkeypatch, config)
    for file in chain["data"].glob("*.jsonl"):
        file.write_text(file.read_text().replace("quick", "slow"))
    with gzip.open(chain["data"] / "1.jsonl.gz", "rt") as stream:
        rows = [json.loads(line)["text"].replace("quick", "slow") for line in stream]
    write_jsonl(chain["data"] / "1.jsonl.gz", rows)
    with pytest.raises(InputError, match="holds other text"):
        run_distill(config)
    assert list(chain["out"].with_name("out.partial").glob("state.step-*"))


def test_a_shard_that_breaks_on_the_way_keeps_the_run(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's mistake any more: exit code 1, the last checkpoint kept."""
    real = Run.advance

    def breaking(self: Run) -> int:
        if self.step == 3:
            with (chain["data"] / "0.jsonl").open("a") as stream:
                stream.write("{broken\n")
        return real(self)

    monkeypatch.setattr(Run, "advance", breaking)
    with pytest.raises(RunError, match=r"last checkpoint is kept\. .*broken JSON"):
        run_distill(DistillConfig(**{**chain, "steps": 500, "batch_size": 12}))
    assert list(chain["out"].with_name("out.partial").glob("state.step-*"))


def empty(path: Path) -> dict[str, Any]:
    write_jsonl(path / "empty.jsonl", ["", "  "])
    return {"data": path / "empty.jsonl"}


def other_column(path: Path) -> dict[str, Any]:
    (path / "other.jsonl").write_text('{"body": "words"}\n')
    return {"data": path / "other.jsonl"}


def short(path: Path) -> dict[str, Any]:
    write_jsonl(path / "short.jsonl", ["a few words"])
    return {"data": path / "short.jsonl", "val_data": path / "rows"}


def prepared(path: Path) -> dict[str, Any]:
    return {"data": make_data(path / "prepared", path / "teacher")}


def other_tokenizer(path: Path) -> dict[str, Any]:
    make_tokenizer(path / "other", vocab=300)
    return {"student": str(make_model(path / "other", vocab_size=400, **SMALL))}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (empty, "no text to train on"),
        (other_column, "no column 'text', only body; choose with --text-column"),
        (short, "less than one sequence of 16"),
        (prepared, "leave out --seq-len"),
        (other_tokenizer, "has another tokenizer than the student"),
        (lambda path: {"seq_len": None}, "is not a prepared data set; .*--seq-len N"),
        (lambda path: {"data": path / "nowhere"}, "nowhere does not exist"),
        (lambda path: {"data": path / "nowhere", "seq_len": None}, "nowhere does not exist; .*data prepare"),
        (lambda path: {"val_data": path / "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        (lambda path: {"seq_len": 4096}, "less than one sequence|context of"),
        (lambda path: {"messages": "talk", "data": path / "teacher" / "tokenizer.json"}, "chat template"),
    ],
)
def test_unusable_sources_are_one_sentence(wrong: Any, message: str, chain: dict[str, Any], tmp_path: Path) -> None:
    changes = wrong(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run_distill(DistillConfig(**{**chain, **changes}))
    assert caught.value.exit_code == 2 and str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_text_can_be_validated_on_while_prepared_data_trains(chain: dict[str, Any], tmp_path: Path) -> None:
    data = make_data(tmp_path / "prepared", Path(chain["teacher"]))
    config = DistillConfig(**{**chain, "data": data, "seq_len": None, "val_data": chain["data"]})
    corpus = open_corpus(config, {"the student": chain["student"]})
    split = corpus.validation(4)
    assert split is not None and split.tokens.shape == (4, SEQ_LEN)
    other = open_corpus(DistillConfig(**{**chain, "val_data": data}), {"the student": chain["student"]})
    measured = other.validation(4)
    assert measured is not None and measured.tokens.shape == (8, SEQ_LEN), "a split is cut by the evaluation"
    inputs = [
        corpus.inputs,
        other.inputs,
        open_corpus(DistillConfig(**chain), {"the student": chain["student"]}).inputs,
    ]
    assert all(one != two for one, two in pairwise(inputs))


def test_weights_and_lists_of_sources_are_for_data_prepare(chain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="training reads one source"):
        open_corpus(DistillConfig(**{**chain, "data": Path(f"{chain['data']}@0.5")}), {"the student": chain["student"]})
