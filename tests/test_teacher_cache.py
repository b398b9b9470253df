"""The cached teacher: records hold what they should, training from them is training on the live top-k words."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_model
from helpers_chain import SMALL, make_checkpoint, make_data
from helpers_tokenizer import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import finish, killed_when

from minitron_cli.config.distill import DEFAULT_TOP_K, DistillConfig
from minitron_cli.config.objective import parse_objective
from minitron_cli.distill import cache_writer
from minitron_cli.distill.bits import bits_for, pack, packed_bytes, unpack
from minitron_cli.distill.cache import ERROR, RECORDS, STEPS, Record, TeacherCache
from minitron_cli.distill.cache_reader import CachedTeacher
from minitron_cli.distill.losses import TopK, forward_kl, top_k, top_k_kl
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.trainer import Batch
from minitron_cli.errors import ConfigError, InputError, OutputError, ResourceError, RunError, ShapeError, UserError
from minitron_cli.manifest import read_manifest
from minitron_cli.models.load import load_model
from minitron_cli.tokens import TokenDataset, batch_rows, read_rows

CPU = torch.device("cpu")


# --- bits and records -------------------------------------------------------------------------------------------------


def slow_pack(values: list[int], bits: int) -> bytes:
    """One long whole number."""
    whole = sum(value << (place * bits) for place, value in enumerate(values))
    return whole.to_bytes(packed_bytes(len(values), bits), "little")


@given(st.data(), st.integers(1, 25), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_packing(data: st.DataObject, bits: int, count: int, rows: int) -> None:
    """Every width and count comes back, and lies where one long number has it."""
    value = st.integers(0, (1 << bits) - 1)
    values = [data.draw(st.lists(value, min_size=count, max_size=count)) for _ in range(rows)]
    packed = pack(np.array(values, np.uint32).reshape(rows, count), bits)
    assert [row.tobytes() for row in packed] == [slow_pack(row, bits) for row in values]
    assert unpack(packed, bits, count).tolist() == values


def test_the_size_of_a_record() -> None:
    """The numbers the documentation names."""
    assert Record(1 << 18, 24).nbytes == 104
    assert Record(151936, 64).nbytes == 64 * 18 // 8 + 2 * 65
    assert Record(2048, 24).nbytes == 24 * 11 // 8 + 2 * 25
    assert [bits_for(count) for count in (2, 3, 4, 5, 1 << 18, (1 << 18) + 1)] == [1, 2, 2, 3, 18, 19]


def answers(seed: int, sharpness: float, vocab: int = 300, tokens: int = 50) -> torch.Tensor:
    """Log-probabilities (tokens, vocab) in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * sharpness).log_softmax(-1)


def stored(top: TopK) -> TopK:
    record = Record(top.vocab, top.ids.shape[1])
    encoded = record.encode(top)
    assert encoded.shape == (len(top.ids), record.nbytes) and encoded.dtype == np.uint8
    return record.decode(encoded)


@given(st.integers(0, 1 << 30), st.sampled_from([0.01, 1.0, 3.0, 10.0]), st.sampled_from([1, 5, 24, 299]))
@settings(max_examples=40, deadline=None)
def test_what_is_stored_is_within_the_bound(seed: int, sharpness: float, k: int) -> None:
    """Ids are exact, masses sum to 1, and KL(P || P~) is below ERROR^2 / 2 (Hoeffding), in fp64."""
    top = top_k(answers(seed, sharpness), k)
    found = stored(top)
    assert torch.equal(found.ids, top.ids) and found.vocab == top.vocab
    exact = torch.cat([top.log_probs, top.log_tail[:, None]], -1)
    read = torch.cat([found.log_probs, found.log_tail[:, None]], -1).double()
    torch.testing.assert_close(read.exp().sum(-1), torch.ones(len(read), dtype=torch.float64), atol=1e-6, rtol=0)
    inside = exact > -63
    assert (exact - read)[inside].abs().max() <= 2 * ERROR + 1e-5
    exact, read = exact.log_softmax(-1), read.log_softmax(-1)  # fp32's own rounding is not what is tested
    kl = (exact.exp() * (exact - read)).sum(-1)
    assert kl.max() <= ERROR**2 / 2 + 1e-12


def test_the_bound_has_power() -> None:
    """Control: eight times coarser steps break it."""
    exact = answers(0, 3.0, vocab=25)
    coarse = ((exact * STEPS / 8).round() / (STEPS / 8)).log_softmax(-1)
    assert ((exact.exp() * (exact - coarse)).sum(-1)).max() > ERROR**2 / 2


def test_storing_costs_far_less_than_cutting() -> None:
    """Against a student: full KL, KL of k words, KL of k words as stored."""
    log_p, log_q = answers(1, 2.0, vocab=2000, tokens=400), answers(2, 1.5, vocab=2000, tokens=400)
    top = top_k(log_p, 24)
    whole, cut = forward_kl(log_q, log_p)[0].mean(), top_k_kl(log_q, top)[0].mean()
    read = stored(top)
    as_read = top_k_kl(log_q, TopK(read.ids, read.log_probs.double(), read.log_tail.double(), read.vocab))[0].mean()
    assert cut <= whole
    assert abs(as_read - cut) < 1e-3 * (whole - cut)


def test_a_sure_teacher() -> None:
    """One word with all the mass, others at nothing, a tail of nothing at all: finite, and zero against itself."""
    logits = torch.zeros(3, 50)
    logits[0, 7] = 1e4
    logits[1, 3:5] = 200.0
    top = top_k(logits.log_softmax(-1), 4)
    found = stored(top)
    assert found.ids[0, 0] == 7 and found.log_probs[0, 0] == pytest.approx(0, abs=1e-6)
    assert found.log_probs[1, :2].tolist() == pytest.approx([-math.log(2)] * 2, abs=1e-6)
    value, slope = top_k_kl(logits.log_softmax(-1), found)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert value.abs().max() < 1e-5


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 1] = math.nan
    with pytest.raises(RunError, match="not finite"):
        stored(top_k(logits.log_softmax(-1), 2))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("cache")
    teacher = make_checkpoint(root / "teacher", seed=0)
    student = make_checkpoint(root / "student", seed=1, num_hidden_layers=2)
    data = make_data(root / "data", teacher)
    return {"student": str(student), "teacher": str(teacher), "data": data}


@pytest.fixture
def chain(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**base, "out": tmp_path / "out"}


RUN: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-3}


def train(chain: dict[str, Any], out: str = "out", **options: Any) -> Any:
    place = Path(chain["out"]).with_name(out)
    return run_distill(DistillConfig(**{**chain, "out": place, **RUN, **options}))


def cache_of(chain: dict[str, Any]) -> Path:
    return Path(chain["out"]).with_name("cache")


def masked(data: Path, path: Path) -> Path:
    """The same data with a third of the tokens as targets, one sequence with none."""
    from minitron_cli.tokens import SplitWriter, write_index

    path.mkdir()
    old, generator, splits = TokenDataset(data), np.random.default_rng(3), {}
    for name in ("train", "validation"):
        split = old.split(name)
        writer = SplitWriter(path, name, old.seq_len, old.vocab_size, masked=True)
        for number, row in enumerate(split.tokens):
            mask = generator.random(old.seq_len) < 0.35
            writer.add(row, len(row), mask & (number != 1))
        splits[name] = writer.close()
    vocab, tokenizer = old.vocab_size, old.tokenizer
    write_index(path, seq_len=old.seq_len, vocab_size=vocab, tokenizer=tokenizer, masked=True, splits=splits)
    return path


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chat", [False, True])
def test_cached_is_live(chain: dict[str, Any], tmp_path: Path, temperature: float, chat: bool) -> None:
    """Losses of every step as with a live teacher on the same k words, to what storing costs; labelled alike."""
    import json

    if chat:
        chain["data"] = masked(chain["data"], tmp_path / "chat")
    options = {"temperature": temperature}
    live = train(chain, "live", loss="topk:5", **options)
    cached = train(chain, "cached", cache_teacher=cache_of(chain), top_k=5, **options)
    assert live.loss == cached.loss == "topk:5"
    curves = [json.loads((tmp_path / name / "curve.json").read_text())["loss"] for name in ("live", "cached")]
    assert curves[0] == pytest.approx(curves[1], abs=2e-4, rel=1e-4)
    assert cached.val_loss_after == pytest.approx(live.val_loss_after, abs=1e-3)
    found = read_manifest(cache_of(chain))["result"]
    targets = TokenDataset(chain["data"]).split("train").targets(range(48))[:, 1:].sum()
    assert found["sequences"] == 48 and found["bytes_per_record"] == Record(_vocab(chain), 5).nbytes
    if not chat:
        assert found["records"] == targets
    assert (cache_of(chain) / RECORDS).stat().st_size == found["records"] * found["bytes_per_record"]


def _vocab(chain: dict[str, Any]) -> int:
    from minitron_cli.checkpoint.reader import Checkpoint

    return int(Checkpoint(Path(chain["student"])).shape["vocab"])


def test_records_are_the_teachers(chain: dict[str, Any]) -> None:
    """Against the stock model, sequence by sequence in fp64; in any order of rows, whatever was read ahead."""
    train(chain, cache_teacher=cache_of(chain), top_k=7, steps=3)
    model = load_model(chain["teacher"], device=CPU, dtype=torch.float64)
    split = TokenDataset(chain["data"]).split("train")
    visits = np.concatenate([batch_rows(0, step, 8, len(split)) for step in range(3)])
    teacher = CachedTeacher(TeacherCache(cache_of(chain)), visits, CPU)
    in_order = [visits[start : start + 4].tolist() for start in range(0, 24, 4)]
    asked = [*in_order, *in_order[4:], in_order[1], [int(visits[9])], [int(visits[3]), int(visits[20])]]
    for rows in asked:
        batch = Batch.read(read_rows(split, rows), CPU)
        found = teacher.lesson(batch)
        assert len(teacher._ahead) <= 16
        expected = top_k(model(batch.ids).logits[:, :-1].flatten(0, 1).log_softmax(-1), 7)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.log_probs.double(), expected.log_probs, atol=2 * ERROR, rtol=0)
        torch.testing.assert_close(found.log_tail.double(), expected.log_tail, atol=2 * ERROR, rtol=0)
    teacher.close()


def test_reading_is_ahead_of_training(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, also after starting midway in a later pass, only the first batch is read by the thread that asks."""
    import threading

    train(chain, cache_teacher=cache_of(chain), top_k=3, steps=16)
    split = TokenDataset(chain["data"]).split("train")
    visits = np.concatenate([batch_rows(0, step, 8, len(split)) for step in range(24)])
    teacher = CachedTeacher(TeacherCache(cache_of(chain)), visits, CPU)
    read, here = teacher._read, threading.current_thread()
    waited: list[int] = []
    monkeypatch.setattr(
        teacher, "_read", lambda row: (waited.append(row) if threading.current_thread() is here else None, read(row))[1]
    )
    for place in range(100, 110):  # single sequences of the second pass
        teacher.lesson(Batch.read(read_rows(split, [int(visits[place])]), CPU))
    assert len(waited) <= 3, "the first, and what follows the same sequence in another pass"
    teacher.close()


def test_two_students_from_one_cache(chain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The second needs no teacher, may take fewer words, and gives the same bytes where it takes as many."""
    first = train(chain, "first", cache_teacher=cache_of(chain), top_k=5)
    assert "lower bound" in capsys.readouterr().err
    written = (cache_of(chain) / RECORDS).stat().st_mtime_ns
    read = {**chain, "teacher": str(cache_of(chain))}
    second = train(read, "second")
    weights = [(Path(chain["out"]).with_name(name) / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1] and second.loss == first.loss == "topk:5"
    fewer = train(read, "fewer", top_k=2, steps=4, loss="0.5*kl+0.5*ce")
    assert fewer.loss == "0.5*topk:2+0.5*ce"
    again = train(chain, "third", cache_teacher=cache_of(chain), top_k=4)
    assert again.loss == "topk:4"
    assert (cache_of(chain) / RECORDS).stat().st_mtime_ns == written, "the cache is used as it is"
    train(read, "first")
    assert "up to date" in capsys.readouterr().err, "however the cache was named"
    other = make_checkpoint(Path(chain["out"]).with_name("wide"), seed=5, intermediate_size=80)
    assert train({**read, "student": str(other)}, "other", steps=3).steps == 3


def test_a_padded_teacher(chain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher with more words than the student is cached over the common ones, as it is compared live."""
    padded = tmp_path / "padded"
    make_tokenizer(padded)
    make_model(padded, vocab_size=_vocab(chain) + 13, **SMALL)
    chain["teacher"] = str(padded)
    live = train(chain, "live", loss="topk:5")
    cached = train(chain, "cached", cache_teacher=cache_of(chain), top_k=5)
    assert "compared over the first" in capsys.readouterr().err
    assert cached.loss_first == pytest.approx(live.loss_first, abs=2e-4)
    assert cached.val_loss_after == pytest.approx(live.val_loss_after, abs=1e-3)
    assert read_manifest(cache_of(chain))["config"]["vocab"] == _vocab(chain)
    wider = {**chain, "student": str(padded)}
    assert train({**wider, "teacher": str(cache_of(chain))}, "wider", steps=2).steps == 2
    train({**wider, "out": tmp_path / "out"}, "wide", cache_teacher=tmp_path / "wide-cache", top_k=5, steps=2)
    with pytest.raises(ShapeError, match="cached over"):
        train({**chain, "teacher": str(tmp_path / "wide-cache")}, "narrow", steps=2)


def refusal(kind: type[UserError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        train(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and caught.value.exit_code == 2
    return message


def test_what_does_not_fit_is_refused(chain: dict[str, Any], tmp_path: Path) -> None:
    """One sentence, and nothing written."""
    cache = cache_of(chain)
    train(chain, "made", cache_teacher=cache, top_k=5, steps=4)
    before = sorted(item.name for item in tmp_path.iterdir())
    read = {**chain, "teacher": str(cache)}
    assert "lacks 16 of the 48" in refusal(InputError, read)
    assert "lacks" in refusal(InputError, read, steps=4, seed=1)
    assert "temperature 1" in refusal(ConfigError, read, steps=4, temperature=2.0)
    assert "asks for 6" in refusal(ConfigError, read, steps=4, top_k=6)
    assert "asks for 9" in refusal(ConfigError, read, steps=4, loss="topk:9")
    for loss in ("rkl", "jsd:0.5", "skl:0.1", "tv", "mse", "cosine", "0.5*kl+0.5*rkl"):
        assert "every word" in refusal(ConfigError, read, steps=4, loss=loss)
    assert "there already" in refusal(ConfigError, read, steps=4, loss="kl+topk:5")
    assert "is a cache already" in refusal(ConfigError, read, steps=4, cache_teacher=tmp_path / "more")
    assert "holds no states" in refusal(ConfigError, read, steps=4, states=("blocks",))
    assert "--top-k goes with" in refusal(ConfigError, chain, steps=4, top_k=6)
    assert "another teacher" in refusal(
        InputError, {**chain, "teacher": chain["student"]}, steps=4, cache_teacher=cache
    )
    assert "lacks" in refusal(InputError, chain, cache_teacher=cache)
    assert "--cache-teacher" in refusal(OutputError, chain, cache_teacher=chain["data"])
    assert "--out" in refusal(ConfigError, chain, cache_teacher=tmp_path / "out" / "cache")
    assert sorted(item.name for item in tmp_path.iterdir()) == before
    other = make_data(tmp_path / "other", Path(chain["teacher"]), train=32)
    assert "other data" in refusal(InputError, {**read, "data": other}, steps=4)


def test_damaged_caches_are_refused(chain: dict[str, Any], tmp_path: Path) -> None:
    cache = cache_of(chain)
    train(chain, "made", cache_teacher=cache, top_k=5, steps=4)
    for number, damage in enumerate(
        [
            lambda path: (path / RECORDS).write_bytes((path / RECORDS).read_bytes()[:-1]),
            lambda path: (path / RECORDS).unlink(),
            lambda path: (path / "index.safetensors").write_bytes(b"\x00" * 20),
            lambda path: (path / "minitron.json").unlink(),
        ]
    ):
        copy = shutil.copytree(cache, tmp_path / f"copy{number}")
        damage(copy)
        for how in ({**chain, "teacher": str(copy)}, {**chain, "cache_teacher": copy}):
            message = refusal(InputError, how, steps=4)
            assert "copy" in message and ("again" in message or "--cache-teacher" in message)


def test_a_cut_while_reading_stops_the_run(chain: dict[str, Any]) -> None:
    train(chain, "made", cache_teacher=cache_of(chain), top_k=5, steps=4)
    cache = TeacherCache(cache_of(chain))
    (cache_of(chain) / RECORDS).write_bytes(b"")
    with pytest.raises(RunError, match="shorter"):
        cache.records(int(cache.rows[0]))
    cache.close()


def test_room_is_asked_for_first(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Disk, and memory for the teacher's passes."""
    real = shutil.disk_usage
    usage = type("usage", (), {"free": 1 << 40})()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(cache_writer, "require_memory", lambda *arguments: (_ for _ in ()).throw(ResourceError("x.")))
    refusal(ResourceError, chain, cache_teacher=cache_of(chain))
    monkeypatch.undo()
    needed = 48 * 15 * Record(_vocab(chain), DEFAULT_TOP_K).nbytes
    state = real(tmp_path)

    def tight(place: Path) -> Any:
        return type("usage", (), {"free": needed if tight.asked else state.free, "asked": setattr(tight, "asked", 1)})()

    tight.asked = 0
    monkeypatch.setattr(shutil, "disk_usage", tight)
    assert "another --cache-teacher" in refusal(ResourceError, chain, cache_teacher=cache_of(chain))
    assert not cache_of(chain).exists() and not list(tmp_path.glob("*.partial"))


def test_an_interrupted_caching_goes_on(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every pass; what a power cut may leave behind the last save is written anew."""
    train(chain, "undisturbed", cache_teacher=cache_of(chain), top_k=5)
    other = cache_of(chain).with_name("other")
    partial = other.with_name("other.partial")
    monkeypatch.setattr(cache_writer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(cache_writer, "PASS_TOKENS", 10 * 16)
    real, passes = cache_writer.likeliest_words, []

    def stopping(*arguments: Any) -> TopK:
        passes.append(1)
        if len(passes) % 2 == 0:
            with (partial / RECORDS).open("ab") as stream:
                stream.write(b"torn")
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(cache_writer, "likeliest_words", stopping)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(chain, "disturbed", cache_teacher=other, top_k=5)
        assert not other.exists() and (partial / "state.json").exists()
    train(chain, "disturbed", cache_teacher=other, top_k=5)
    assert len(passes) == 9, "48 sequences are 5 passes: 4 once, then the last"
    assert sorted(item.name for item in other.iterdir()) == ["index.safetensors", "minitron.json", RECORDS]
    monkeypatch.setattr(cache_writer, "likeliest_words", real)
    third = cache_of(chain).with_name("third")
    train(chain, "whole", cache_teacher=third, top_k=5)
    for name in (RECORDS, "index.safetensors"):
        assert (third / name).read_bytes() == (other / name).read_bytes()
    weights = [
        (Path(chain["out"]).with_name(name) / "model.safetensors").read_bytes() for name in ("disturbed", "whole")
    ]
    assert weights[0] == weights[1]


EAGER = """
from minitron_cli.distill import cache_writer
cache_writer.SAVE_SECONDS, cache_writer.PASS_TOKENS = 0.0, 16
from minitron_cli.cli import main
main()
"""
"""The command line, with teacher passes of one sequence that are made durable at once."""


def test_kill_while_caching_and_while_training(base: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 in each, and the same command again: the same cache and the same student."""

    def command(name: str) -> list[str]:
        options = ["--cache-teacher", str(tmp_path / f"{name}-cache"), "--top-k", "5", "--steps", "40"]
        options += ["--batch-size", "8", "--save-every", "10", "--data", str(base["data"])]
        options += ["--teacher", base["teacher"], "--out", str(tmp_path / name)]
        return [sys.executable, "-c", EAGER, "distill", base["student"], *options]

    finish(command("whole"))
    cache, student = tmp_path / "killed-cache.partial" / "state.json", tmp_path / "killed.partial"
    killed_when(command("killed"), cache.exists)
    assert not (tmp_path / "killed-cache").exists()
    killed_when(command("killed"), lambda: any(student.glob("state.step-*.safetensors")))
    assert (tmp_path / "killed-cache").exists() and not (tmp_path / "killed").exists()
    assert "Resuming at step" in finish(command("killed"))
    for name in ("-cache/records.bin", "-cache/index.safetensors", "/model.safetensors"):
        assert Path(f"{tmp_path}/killed{name}").read_bytes() == Path(f"{tmp_path}/whole{name}").read_bytes(), name


def test_objectives_of_a_cache() -> None:
    """What is trained on is what is said."""
    for spec, expected in [
        ("kl", "topk:9"),
        ("0.9*kl+0.1*ce", "0.9*topk:9+0.1*ce"),
        ("topk:4", "topk:4"),
        ("ce", "ce"),
    ]:
        objective = parse_objective(spec).on_top_k(9)
        assert str(objective) == expected and parse_objective(str(objective)) == objective
    assert parse_objective("topk:4+0.5*topk:8").top_k == (4, 8)
