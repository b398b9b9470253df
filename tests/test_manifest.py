"""Output directories: what appears, what is refused, what resumes, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minitron_cli import manifest
from minitron_cli.config.base import WritingConfig, option
from minitron_cli.errors import InputError, OutputError, ResourceError, RunError
from minitron_cli.manifest import INTENT, LOCK, MANIFEST, StageOutput, fingerprint, read_manifest, require_disk


@dataclass(frozen=True, kw_only=True)
class Config(WritingConfig):
    """A stage for tests."""

    size: int = option(1, "A number.")
    pace: int = option(1, "A number that changes nothing.", keyed=False)


class Stage:
    """One output directory in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.partial = folder / "out.partial"

    def open(self, size: int = 1, *, inputs: dict[str, str] | None = None, **changes: Any) -> StageOutput:
        config = Config(out=self.out, size=size, pace=changes.pop("pace", 1))
        return StageOutput(self.out, "test", config, inputs or {"data": "abc"}, **changes)

    def make(self, size: int = 1, **changes: Any) -> StageOutput:
        output = self.open(size, **changes)
        with output:
            (output.partial / "file").write_text(f"content {size}")
            output.commit({"answer": size})
        return output

    def listing(self) -> list[str]:
        return sorted(item.relative_to(self.out.parent).as_posix() for item in self.out.parent.rglob("*"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_finished_output(stage: Stage) -> None:
    stage.make()
    assert stage.listing() == ["out", "out/file", f"out/{MANIFEST}"]
    written = read_manifest(stage.out)
    assert written is not None
    assert written["result"] == {"answer": 1} and written["stage"] == "test" and written["inputs"] == {"data": "abc"}
    assert written["config"]["size"] == 1 and set(written["versions"]) >= {"python", "torch", "transformers"}


def test_up_to_date(stage: Stage) -> None:
    stage.make()
    before = (stage.out / MANIFEST).read_bytes()
    for changes in ({}, {"pace": 9}, {"force": True}, {"resumable": True}):
        assert stage.open(**changes).result == {"answer": 1}
    assert (stage.out / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("changes", [{"size": 2}, {"inputs": {"data": "other"}}])
def test_another_result_is_refused_without_force(stage: Stage, changes: dict[str, Any]) -> None:
    stage.make()
    before = stage.listing()
    with pytest.raises(OutputError, match=r"another test run; .*--force"):
        stage.open(**changes)
    assert stage.listing() == before
    assert stage.make(**changes, force=True).result == {"answer": changes.get("size", 1)}
    assert stage.listing() == before


def test_force_keeps_the_old_output_until_the_new_one_is_whole(stage: Stage) -> None:
    stage.make()
    with pytest.raises(ZeroDivisionError), stage.open(2, force=True) as output:
        (output.partial / "file").write_text("half")
        raise ZeroDivisionError
    assert (stage.out / "file").read_text() == "content 1"
    assert not stage.partial.exists()


def test_foreign_files_are_refused(stage: Stage) -> None:
    stage.out.mkdir()
    (stage.out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not ours"):
        stage.open()
    assert stage.listing() == ["out", "out/thesis.tex"]


def test_an_empty_directory_is_taken(stage: Stage) -> None:
    stage.out.mkdir()
    stage.make()
    assert stage.listing() == ["out", "out/file", f"out/{MANIFEST}"]


def test_a_damaged_manifest_is_a_foreign_directory(stage: Stage) -> None:
    stage.make()
    (stage.out / MANIFEST).write_text('{"key": ')
    with pytest.raises(OutputError, match="not ours"):
        stage.open()


@pytest.mark.parametrize("force", [False, True])
def test_out_is_a_file(stage: Stage, force: bool) -> None:
    stage.out.write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        stage.open(force=force)


def test_out_below_a_file(stage: Stage) -> None:
    (stage.out.parent / "file").write_text("x")
    stage.out = stage.out.parent / "file" / "deep" / "out"
    with pytest.raises(OutputError, match=r"file is a file"):
        stage.open()


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_out_needs_a_name(out: str) -> None:
    with pytest.raises(OutputError, match="name the directory"):
        StageOutput(Path(out), "test", Config(out=Path(out)), {})


@pytest.mark.parametrize("inside", ["cwd", "home"])
def test_force_never_replaces_where_the_user_is(stage: Stage, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = stage.out / "project"
    place.mkdir(parents=True)
    if inside == "cwd":
        monkeypatch.chdir(place)
    else:
        monkeypatch.setenv("HOME", str(place))
    with pytest.raises(OutputError, match="contains"):
        stage.open(force=True)


def test_foreign_partial(stage: Stage) -> None:
    stage.partial.mkdir()
    (stage.partial / "mine").write_text("x")
    with pytest.raises(OutputError, match="not ours"):
        stage.open()
    assert (stage.partial / "mine").exists()
    stage.make(force=True)
    assert stage.listing() == ["out", "out/file", f"out/{MANIFEST}"]


def test_partial_is_a_file(stage: Stage) -> None:
    stage.partial.write_text("x")
    with pytest.raises(OutputError, match="in the way"):
        stage.open()


def interrupted(stage: Stage, size: int = 1, **changes: Any) -> None:
    """A resumable run stopped by Ctrl-C after some work."""
    with pytest.raises(KeyboardInterrupt), stage.open(size, resumable=True, **changes) as output:
        (output.partial / "state.json").write_text("step 5")
        raise KeyboardInterrupt


def test_resuming(stage: Stage) -> None:
    interrupted(stage)
    output = stage.open(resumable=True)
    assert output.resuming
    with output:
        assert (output.partial / "state.json").read_text() == "step 5"
        output.commit({"answer": 1})
    assert stage.listing() == ["out", f"out/{MANIFEST}"], "the state served resuming only"


def test_work_of_another_configuration_is_not_resumed(stage: Stage) -> None:
    interrupted(stage)
    output = stage.open(2, resumable=True)
    assert not output.resuming
    with output:
        assert not (output.partial / "state.json").exists()
        output.commit({"answer": 2})


def test_what_cannot_resume_cleans_up(stage: Stage) -> None:
    for kind in (KeyboardInterrupt, ValueError, RunError, InputError):
        with pytest.raises(kind), stage.open() as output:
            (output.partial / "folder").mkdir()
            (output.partial / "folder" / "file").write_text("half")
            raise kind
        assert stage.listing() == []


def test_a_user_error_leaves_nothing_unless_there_was_work(stage: Stage) -> None:
    with pytest.raises(InputError), stage.open(resumable=True):
        raise InputError("bad")
    assert stage.listing() == []
    interrupted(stage)
    with pytest.raises(InputError), stage.open(resumable=True):
        raise InputError("bad")
    assert stage.open(resumable=True).resuming


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("resumable", [False, True])
def test_full_disk(stage: Stage, full: Exception, resumable: bool) -> None:
    with pytest.raises(RunError, match="disk filled up") as caught, stage.open(resumable=resumable):
        raise full
    assert ("resumes" in str(caught.value)) == resumable
    assert stage.partial.exists() == resumable
    assert stage.open(resumable=resumable).resuming == resumable


def test_another_error_of_the_system_is_passed_on(stage: Stage) -> None:
    with pytest.raises(OSError, match="Input/output"), stage.open():
        raise OSError(errno.EIO, "Input/output error")


def test_full_disk_while_committing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with stage.open(resumable=True) as output:
        (output.partial / "file").write_text("content 1")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(manifest, "sync_tree", full)
            output.commit({"answer": 1})
        assert not stage.out.exists() and (stage.partial / INTENT).exists()


def holder(stage: Stage, then: str) -> subprocess.Popen[str]:
    """Another process that has entered the same output and does `then`."""
    code = (
        "import os, signal, sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_manifest\n"
        "from minitron_cli import manifest\n"
        "stage = test_manifest.Stage(Path(sys.argv[2]))\n"
        "with stage.open(resumable=True) as output:\n"
        "    (output.partial / 'file').write_text('content 1')\n"
        "    print('entered', flush=True)\n"
        f"    {then}\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(stage.out.parent)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "entered\n"
    return process


def test_the_lock_keeps_others_out_and_dies_with_its_process(stage: Stage) -> None:
    process = holder(stage, "time.sleep(60)")
    try:
        with pytest.raises(OutputError, match="Another process"), stage.open(resumable=True):
            pass
        assert (stage.partial / "file").exists(), "the refused process must not clean up"
        with pytest.raises(OutputError, match="Another process"), stage.open(2, force=True):
            pass
        assert (stage.partial / "file").exists()
    finally:
        process.kill()
        process.wait()
    assert (stage.partial / LOCK).exists()
    output = stage.open(resumable=True)
    assert output.resuming
    with output:
        output.commit({"answer": 1})


@pytest.mark.parametrize("call", ["manifest.sync_tree", "manifest.write_json", "output._publish", "os.rename"])
def test_death_inside_a_commit(stage: Stage, call: str) -> None:
    """Wherever a commit is cut off, the next run ends with the whole output and no questions."""
    die = f"{call} = lambda *a: os.kill(os.getpid(), signal.SIGKILL); output.commit({{'answer': 1}})"
    assert holder(stage, die).wait() == -signal.SIGKILL
    assert not stage.out.exists()
    output = stage.open(resumable=True)
    if call in ("output._publish", "os.rename"):  # the manifest was there: only the rename was missing
        assert output.result == {"answer": 1}
    else:
        assert output.resuming
        with output:
            output.commit({"answer": 1})
    assert stage.listing() == ["out", "out/file", f"out/{MANIFEST}"]
    assert stage.open().result == {"answer": 1}


def test_death_before_the_first_file(stage: Stage) -> None:
    """A partial directory with a lock and nothing else is ours."""
    stage.partial.mkdir()
    (stage.partial / LOCK).touch()
    (stage.partial / (INTENT + ".tmp")).write_text("{")
    stage.make()
    assert stage.listing() == ["out", "out/file", f"out/{MANIFEST}"]


def test_a_finished_partial_of_another_run_is_replaced(stage: Stage) -> None:
    die = "os.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL); output.commit({'answer': 1})"
    holder(stage, die).wait()
    assert stage.make(2).result == {"answer": 2}
    assert (stage.out / "file").read_text() == "content 2"


def test_out_that_appears_meanwhile_is_not_replaced(stage: Stage) -> None:
    with pytest.raises(RunError, match="appeared"), stage.open() as output:
        (output.partial / "file").write_text("content 1")
        stage.out.mkdir()
        (stage.out / "thesis.tex").write_text("years of work")
        output.commit({"answer": 1})
    assert (stage.out / "thesis.tex").exists()
    (stage.out / "thesis.tex").rename(stage.out.parent / "thesis.tex")
    assert stage.open().result == {"answer": 1}, "the finished work was kept"


def test_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "small").write_text("a")
    (folder / "large").write_bytes(bytes(3 << 20))
    first = fingerprint(folder)

    os.utime(folder / "small", ns=(1, 1))
    (folder / MANIFEST).write_text(json.dumps({"seconds": 3}))
    (folder / LOCK).touch()
    assert fingerprint(folder) == first, "times of small files and our own records say nothing"

    seen = {first}
    for change in (
        lambda: (folder / "small").write_text("b"),
        lambda: os.utime(folder / "large", ns=(1, 1)),
        lambda: (folder / "large").write_bytes(bytes((3 << 20) + 1)),
        lambda: (folder / "small").rename(folder / "renamed"),
        lambda: (folder / "renamed").unlink(),
    ):
        change()
        assert fingerprint(folder) not in seen
        seen.add(fingerprint(folder))


def test_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "file").write_text("same")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_require_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there", 1, "This")
    with pytest.raises(ResourceError, match=r"^This needs .* GB of disk and .* free; free some space"):
        require_disk(tmp_path / "not" / "there", 1 << 62, "This")


def test_a_model_card_does_not_make_another_checkpoint(tmp_path: Path) -> None:
    """Prose and a clone's hidden files leave a checkpoint's identity alone; in a folder of text they are the data."""
    before = {}
    for name in ("model", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("model", "text"):
        before[name] = fingerprint(tmp_path / name)
        (tmp_path / name / "README.md").write_text("hello")
        (tmp_path / name / ".git").mkdir()
        (tmp_path / name / ".git" / "HEAD").write_text("ref")
    assert fingerprint(tmp_path / "model") == before["model"]
    assert fingerprint(tmp_path / "text") != before["text"]
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 1}')
    assert fingerprint(tmp_path / "model") != before["model"]
