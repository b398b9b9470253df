"""Output directories that appear only when complete, and the record of how they came about.

A stage writes into `OUT.partial` and renames it to `OUT` after the manifest `minitron.json`, written last, is on disk.
The manifest holds a key: a hash of the stage, the configuration and the fingerprints of the inputs. The same key means
"up to date"; another key in a complete OUT is refused without `force`; the same key in OUT.partial is resumed.

A kill at any instant leaves one of: an OUT.partial that says whose it is (`minitron.partial.json`), an OUT.partial with
its manifest, which the next run only renames, or OUT.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from minitron_cli import __version__
from minitron_cli.config.base import StageConfig
from minitron_cli.errors import MinitronError, OutputError, ResourceError, RunError, is_disk_full

MANIFEST = "minitron.json"
INTENT = "minitron.partial.json"
LOCK = "minitron.lock"
OURS = {LOCK, INTENT, INTENT + ".tmp"}
"""What a partial directory holds before any work."""
WORKING = ("state.*", "*.tmp")
"""Files at the top of a partial directory that only serve resuming; a commit removes them."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Identity of an input without reading its bulk: small files by content, large ones by header, size and mtime.

    A directory is identified by all its files but the manifest, and a checkpoint's model card and hidden files.
    Content of files up to 1 MiB counts whole; of larger files the first 64 KiB (a safetensors header or its start),
    the size and the modification time.
    """
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    model = (path / "config.json").is_file()
    parts: list[list[Any]] = []
    for item in files:
        status = item.stat()
        name = item.relative_to(path).as_posix() if path.is_dir() else item.name
        if item.name == MANIFEST or item.name in OURS or (model and name.startswith((".", "README.md"))):
            continue  # times, a model card, a clone's own files: none decides what a stage writes
        with item.open("rb") as stream:
            small = status.st_size <= 1 << 20
            head = hashlib.sha256(stream.read(1 << 20 if small else 1 << 16)).hexdigest()
        parts.append([name, status.st_size, head, None if small else status.st_mtime_ns])
    return digest(parts)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete stage output, or None."""
    try:
        value = json.loads((directory / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one (temporary name, fsync, rename)."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """fsync every file and directory below `path`."""
    for root, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(root, name), "rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(Path(root))


def require_disk(out: Path, needed: int, what: str, option: str = "--out") -> None:
    """Refuse before any work when the disk that will hold `out` lacks `needed` bytes.

    Raises:
        ResourceError: less than `needed` bytes are free.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB of disk and {place} has {free / 1e9:.2f} GB free; "
            f"free some space or choose another {option}."
        )


class StageOutput:
    """The life of one output directory; use as a context manager around the work.

    >>> output = StageOutput(config.out, "prune", config, {"checkpoint": fingerprint(path)})
    >>> if output.result is None:
    ...     with output:
    ...         (output.partial / "model.safetensors").write_bytes(...)
    ...         output.commit({"params_after": 1})

    Construction decides and checks without touching the disk: `result` is set when OUT is complete and up to date;
    `resuming` when OUT.partial holds work of the same key. (One exception: an OUT.partial whose process died between
    manifest and rename is renamed.) Entering creates or empties OUT.partial.
    """

    def __init__(
        self,
        out: Path,
        stage: str,
        config: StageConfig,
        inputs: Mapping[str, str],
        *,
        force: bool = False,
        resumable: bool = False,
    ) -> None:
        self.out, self.stage, self.config, self.inputs = out, stage, config, dict(inputs)
        self.force, self.resumable = force, resumable
        if out.name in ("", ".."):
            raise OutputError(f"--out {out} has no name of its own; name the directory to create.")
        self.partial = out.with_name(out.name + ".partial")
        self.key = digest([stage, config.key(), self.inputs])
        self.result: dict[str, Any] | None = None
        self.resuming = False
        self._complete = False
        self._lock: int | None = None
        self._began = time.time()
        self._inspect_out()
        self._inspect_partial()

    def _inspect_out(self) -> None:
        above = next(place for place in self.out.absolute().parents if place.exists())
        if not above.is_dir():
            raise OutputError(f"{above} is a file, so {self.out} cannot be made; choose another --out.")
        if not (self.out.is_symlink() or self.out.exists()):
            return
        if not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; choose another --out.")
        manifest = read_manifest(self.out)
        if manifest is not None and manifest.get("key") == self.key:
            self.result = manifest["result"]
        elif any(self.out.iterdir()):
            if not self.force:
                made = f"the result of another {manifest.get('stage')} run" if manifest else "files that are not ours"
                raise OutputError(
                    f"{self.out} already holds {made}; choose another --out or add --force to replace it."
                )
            for place in (Path.cwd(), Path.home()):
                if place.resolve().is_relative_to(self.out.resolve()):
                    raise OutputError(f"{self.out} contains {place} and is not replaced; choose another --out.")

    def _inspect_partial(self) -> None:
        if self.result is not None or not self.partial.exists():
            return
        if not self.partial.is_dir():
            raise OutputError(f"{self.partial} is a file and in the way; move it or choose another --out.")
        finished = read_manifest(self.partial)
        if finished is not None and finished.get("key") == self.key:
            self._acquire()
            self._publish()
            self.result = finished["result"]
            self._release()
            return
        try:
            intent = json.loads((self.partial / INTENT).read_text("utf-8"))
        except (OSError, ValueError):
            intent = finished
        if intent is None and not self.force and any(item.name not in OURS for item in self.partial.iterdir()):
            raise OutputError(f"{self.partial} holds files that are not ours; move them away or add --force.")
        self.resuming = self.resumable and intent is not None and intent.get("key") == self.key

    def __enter__(self) -> Self:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._acquire()
        if not self.resuming:
            if any(item.name not in OURS for item in self.partial.iterdir()):
                # Until it is empty nobody may resume it, neither the old key's run nor ours.
                write_json(self.partial / INTENT, {"stage": self.stage, "key": ""})
                self._empty()
            write_json(self.partial / INTENT, {"stage": self.stage, "key": self.key})
        return self

    def _empty(self) -> None:
        for item in self.partial.iterdir():
            if item.name not in (LOCK, INTENT):
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    def _acquire(self) -> None:
        """A kernel lock on the partial directory: it dies with the process, so none is ever stale."""
        self._lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
            self._release()
            raise OutputError(
                f"Another process is writing {self.partial}; wait for it or choose another --out."
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def commit(self, result: Mapping[str, Any], **more: Any) -> None:
        """Make everything durable, write the manifest (with `more` in it), and let OUT appear.

        Raises:
            RunError: somebody else made OUT meanwhile; OUT.partial is complete and kept.
        """
        manifest: dict[str, Any] = {
            "stage": self.stage,
            "key": self.key,
            "minitron": __version__,
            "versions": library_versions(),
            "config": self.config.to_json(),
            "inputs": self.inputs,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._began)),
            "seconds": round(time.time() - self._began, 3),
            "result": dict(result),
            **more,
        }
        sync_tree(self.partial)
        write_json(self.partial / MANIFEST, manifest)
        self._complete = True
        self._publish()
        self.result = manifest["result"]

    def _publish(self) -> None:
        """From an OUT.partial with its manifest to OUT; may be repeated after a kill."""
        for pattern in (*WORKING, INTENT):
            for item in self.partial.glob(pattern):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        if self.out.exists():
            found = read_manifest(self.out)
            if not self.force and any(self.out.iterdir()) and (found is None or found.get("key") != self.key):
                raise RunError(f"{self.out} appeared while {self.partial} was written; move one away and run again.")
            names = (self.out.with_name(f"{self.out.name}.replaced{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            os.rename(self.out, aside)
            os.rename(self.partial, self.out)
            shutil.rmtree(aside)
        else:
            os.rename(self.partial, self.out)
        (self.out / LOCK).unlink(missing_ok=True)  # after the rename: until then it keeps others out
        sync_directory(self.out)
        sync_directory(self.out.parent)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        refused = isinstance(error, MinitronError) and error.exit_code == 2 and not self.resuming
        useless = kind is not None and (refused or not self.resumable)
        if useless and not self._complete and self.partial.exists():
            with contextlib.suppress(OSError):
                self._empty()
                for name in (INTENT, LOCK):
                    (self.partial / name).unlink(missing_ok=True)
                self.partial.rmdir()
        self._release()
        if error is not None and is_disk_full(error):
            kept = f"; what {self.partial} holds is valid and the same command resumes" if self.resumable else ""
            raise RunError(
                f"The disk filled up while writing {self.partial}{kept}; free some space and run again."
            ) from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    import platform
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
