"""What the user gets wrong: exit code 2, one sentence on stderr, nothing on stdout, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import make_model
from helpers_eval import make_checkpoint, make_data

from minitron_cli import families
from minitron_cli.cli import main

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer, one with, and prepared data of the latter's tokenizer."""
    folder = tmp_path_factory.mktemp("originals")
    make_model(folder / "llama")
    make_checkpoint(folder / "teacher")
    make_data(folder / "data")
    return folder


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with copies of them."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {number}" for number in range(400)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """Run the command line in this process: exit code, stdout, stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minitron", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    yield run
    signal.signal(signal.SIGTERM, before)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with sizes and times."""
    return {
        item.relative_to(folder).as_posix(): (item.stat().st_size, item.stat().st_mtime_ns if item.is_file() else 0)
        for item in folder.rglob("*")
    }


def refused(invoke: Invoke, folder: Path, command: str, words: str) -> None:
    before = listing(folder)
    code, out, err = invoke(*command.split(), "--quiet")
    assert (code, out) == (2, ""), err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("minitron: ") and lines[0].rstrip()[-1] in ".?)", err
    assert words in err, err
    assert listing(folder) == before


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def pickled(place: Path) -> None:
    (place / "llama" / "model.safetensors").rename(place / "llama" / "pytorch_model.bin")


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing path": (lambda p: None, "./nowhere", "does not exist"),
    "not on the hub": (lambda p: None, "nobody/nothing-here", "not a local path"),
    "neither path nor id": (lambda p: None, "a/b/c/d", "neither an existing path nor a Hub id"),
    "no such built-in": (lambda p: None, "builtin:huge", "builtin:tiny-py"),
    "a file": (lambda p: (p / "notes.txt").write_text("x"), "notes.txt", "give the directory"),
    "an empty directory": (lambda p: (p / "empty").mkdir(), "empty", "no config.json"),
    "config is not JSON": (lambda p: (p / "llama" / "config.json").write_text("{"), "llama", "cannot be read"),
    "config is a list": (lambda p: (p / "llama" / "config.json").write_text("[]"), "llama", "JSON object"),
    "no weights": (lambda p: (p / "llama" / "model.safetensors").unlink(), "llama", "no safetensors weights"),
    "pickled weights": (pickled, "llama", "minitron convert"),
    "end of file lost": (lambda p: cut(p / "llama" / "model.safetensors", -10), "llama", "truncated"),
    "header lost": (lambda p: cut(p / "llama" / "model.safetensors", 5), "llama", "truncated"),
    "header cut": (lambda p: cut(p / "llama" / "model.safetensors", 100), "llama", "truncated"),
    "not safetensors": (
        lambda p: (p / "llama" / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"not a header at " + bytes(99)),
        "llama",
        "damaged safetensors header",
    ),
    "index names a lost file": (
        lambda p: (
            (p / "llama" / "model.safetensors").unlink(),
            (p / "llama" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}'),
        ),
        "llama",
        "finish the download",
    ),
    "unknown family": (lambda p: edit_config(p / "llama", model_type="mamba3"), "llama", "'mamba3'"),
    "no model type": (lambda p: edit_config(p / "llama", model_type=None), "llama", "model_type"),
    "another shape": (lambda p: edit_config(p / "llama", intermediate_size=64), "llama", "do not belong together"),
    "another depth": (lambda p: edit_config(p / "llama", num_hidden_layers=5), "llama", "lacks tensor"),
    "a layer too many": (lambda p: edit_config(p / "llama", num_hidden_layers=3), "llama", "refusing to drop"),
    "senseless size": (lambda p: edit_config(p / "llama", hidden_size="48"), "llama", "'hidden_size'"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.parametrize("command", ["prune {} --hidden 36 --out new", "verify {}"])
def test_checkpoint(case: str, command: str, place: Path, invoke: Invoke) -> None:
    prepare, reference, words = CHECKPOINTS[case]
    prepare(place)
    refused(invoke, place, command.format(reference), words)


@pytest.mark.parametrize("case", ["missing path", "config is not JSON", "end of file lost", "unknown family"])
@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "importance {} --data data --out new",
        "search {} --params 50% --list",
        "distill {} --teacher teacher --data data --steps 1 --out new",
        "compress {} --params 50% --data notes --out new",
    ],
)
def test_checkpoint_of_other_commands(case: str, command: str, place: Path, invoke: Invoke) -> None:
    prepare, reference, words = CHECKPOINTS[case]
    if case == "end of file lost" and ("--list" in command or "compress" in command):
        pytest.skip("config.json alone is enough to list shapes; compress meets the weights after the data")
    prepare(place)
    (place / "notes").mkdir(exist_ok=True)
    refused(invoke, place, command.format(reference), words)


SIZES = [
    ("--heads 5 --kv-heads 3", "not a multiple of kv_heads"),
    ("--hidden 32", "LlamaConfig"),
    ("--head-dim 7", "pairs"),
    ("--hidden 64", "larger than the original 48"),
    ("--ffn 57", "larger than the original 56"),
    ("--layers 5", "larger than the original 4"),
    ("--heads 12", "larger than the original 6"),
    ("--heads 6 --kv-heads 2", "per group"),
    ("--hidden 0", "--hidden"),
    ("--hidden many", "'--hidden'"),
    ("--drop-layers 1,9", "layers 0 to 3"),
    ("--drop-layers 0,1,2,3", "every layer"),
    ("--drop-layers 1,x", "--drop-layers"),
    ("--layers 2 --drop-layers 1", "not both"),
    ("", "Nothing to cut"),
    ("--plan nowhere.json", "nowhere.json"),
    ("--plan data/dataset.json", "not a prune plan"),
    ("--plan llama/model.safetensors", "cannot be read as a plan"),
    ("--search data", "not a finished `minitron search`"),
    ("--hidden 36 --importance data", "importance"),
    ("--hidden 36 --plan data/dataset.json", "only one of the three"),
]


@pytest.mark.parametrize(("options", "words"), SIZES, ids=[options or "nothing" for options, _ in SIZES])
def test_sizes(options: str, words: str, place: Path, invoke: Invoke) -> None:
    refused(invoke, place, f"prune llama --out new {options}", words)
    refused(invoke, place, f"prune llama --out new --dry-run {options}", words)


def test_size_of_an_axis_that_stays(place: Path, invoke: Invoke) -> None:
    refused(invoke, place, "search llama --params 50% --grid vocab=32 --list", "cannot cut it")


def test_a_family_that_is_inspected_only(place: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tuple(dataclasses.replace(family, draft=True) for family in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", draft)
    for command in ("prune llama --hidden 36 --out new", "search llama --params 50% --list"):
        refused(invoke, place, command, "not pruned yet")


OUTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "holds something else": (lambda p: None, "data", "--force"),
    "is the checkpoint": (lambda p: None, "llama", "the checkpoint itself"),
    "is a file": (lambda p: (p / "file").write_text("x"), "file", "is a file"),
    "is below a file": (lambda p: (p / "file").write_text("x"), "file/new", "is a file"),
    "is the working directory": (lambda p: None, ".", "name"),
    "has a foreign partial": (
        lambda p: ((p / "new.partial").mkdir(), (p / "new.partial" / "x").touch()),
        "new",
        "not ours",
    ),
}


@pytest.mark.parametrize("case", OUTS)
def test_out(case: str, place: Path, invoke: Invoke) -> None:
    prepare, out, words = OUTS[case]
    prepare(place)
    refused(invoke, place, f"prune llama --hidden 36 --out {out}", words)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    "command",
    [
        "prune llama --hidden 36 --out new",
        "prune llama --hidden 36 --out deep/down/new",
        "data prepare text.txt --tokenizer teacher --seq-len 4 --out new",
    ],
)
def test_too_little_disk(command: str, place: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    refused(invoke, place, command, "free some space")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("inspect", "Missing argument"),
        ("inspekt llama", "'inspect'"),
        ("inspect llama teacher", "unexpected extra argument"),
        ("data prepair x", "'prepare'"),
        ("prune llama --hiden 32 --out new", "--hidden"),
        ("prune llama --hidden 36", "--out"),
        ("prune llama --hidden 36 --layer-score best --out new", "'auto', 'loss'"),
        ("prune llama --hidden 36 --shard-bytes 0 --out new", "--shard-bytes"),
        ("distill teacher --data data --steps 1 --out new --loss klx --teacher teacher", "klx"),
        ("distill teacher --data data --steps 1 --out new", "--teacher"),
        ("distill teacher --data data --out new --teacher teacher", "--steps or --tokens"),
        ("distill teacher --data data --steps x --out new --teacher teacher", "--steps"),
        ("distill teacher --data data --steps 1 --lr -1 --out new --teacher teacher", "--lr"),
        ("eval teacher --data data --device tpu --out new", "tpu"),
        ("eval teacher --data data --dtype int8 --out new", "int8"),
        ("eval teacher --out new", "--tasks"),
        ("eval teacher --data data --device cuda:99 --out new", "cuda"),
        ("eval teacher --tasks no_such_task --out new", "no_such_task"),
        ("search llama --list", "--params"),
        ("search llama --params huge --list", "huge"),
        ("search llama --params 50% --grid hidden --list", "--grid"),
        ("search llama --params 50% --grid width=3 --list", "width"),
        ("search llama --params 50% --grid hidden=64 --list", "larger than the original"),
        ("search llama --params-range 1:2 --list", "1 to 2 total parameters are asked for"),
        ("search llama --params 50%", "--importance"),
    ],
)
def test_options(command: str, words: str, place: Path, invoke: Invoke) -> None:
    refused(invoke, place, command, words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("importance teacher --data nowhere --out new", "nowhere"),
        ("importance teacher --data llama --out new", "llama"),
        ("importance teacher --data data --out new", "train"),
        ("eval teacher --data nowhere --out new", "nowhere"),
        ("eval llama --data data --out new", "tokenizer"),
        ("eval teacher --tasks mmlu --data-dir nowhere --out new", "nowhere"),
        ("distill teacher --teacher teacher --data nowhere --steps 1 --out new", "nowhere"),
        ("distill teacher --teacher teacher --data data --steps 1 --out new", "train"),
        ("data prepare nowhere --tokenizer teacher --out new", "nowhere"),
        ("data prepare text.txt --tokenizer llama --out new", "tokenizer"),
        ("data prepare text.txt --tokenizer nowhere --out new", "nowhere"),
        ("data prepare text.txt --tokenizer teacher --seq-len 1 --out new", "--seq-len"),
        ("data prepare text.txt --tokenizer teacher --seq-len 100000 --out new", "--seq-len"),
        ("run nowhere.yaml --out new", "quickstart"),
        ("run quickstart --set distill.stepz=1 --out new", "steps"),
        ("run quickstart --set teacher=./nowhere --out new", "does not exist"),
        ("run quickstart --out data", "not a minitron run"),
        ("compress llama --params 50% --data nowhere --out data", "not a minitron run"),
        ("report data", "data"),
        ("report nowhere", "nowhere"),
    ],
)
def test_inputs(command: str, words: str, place: Path, invoke: Invoke) -> None:
    refused(invoke, place, command, words)


def test_without_quiet_the_error_is_the_last_line(place: Path, invoke: Invoke) -> None:
    code, out, err = invoke("prune", "llama", "--hidden", "64", "--out", "new", "--json")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("minitron: --hidden 64")


def test_no_words_is_help(invoke: Invoke) -> None:
    code, out, err = invoke()
    assert code == 2 and "prune" in out + err


def test_success_is_zero(place: Path, invoke: Invoke) -> None:
    code, out, err = invoke("prune", "llama", "--drop-layers", "1,2", "--out", "new", "--json", "--quiet")
    assert (code, err) == (0, "") and json.loads(out)["shape"]["layers"] == 2
    assert sorted(item.name for item in place.iterdir()) == ["data", "llama", "new", "teacher", "text.txt"]
