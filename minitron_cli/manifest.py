"""Output directories that appear only when complete, and the record of how they came about.

A stage writes into `OUT.partial` and renames it to `OUT` after the manifest `minitron.json`, written last, is on disk.
The manifest holds a key: a hash of the stage, the configuration and the fingerprints of the inputs. The same key means
"up to date"; another key in a complete OUT is refused without `force`; the same key in OUT.partial is resumed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
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
from minitron_cli.errors import MinitronError, OutputError, ResourceError, RunError

MANIFEST = "minitron.json"
INTENT = "minitron.partial.json"
LOCK = "minitron.lock"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """Identity of an input without reading its bulk: small files by content, large ones by header, size and mtime.

    A directory written by minitron is identified by its manifest's key and the sizes of its files; other directories
    by all files. Content of files up to 1 MiB counts whole; of larger files the first 64 KiB (a safetensors header or
    its start), the size and the modification time.
    """
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    parts: list[list[Any]] = []
    for item in files:
        status = item.stat()
        name = item.relative_to(path).as_posix() if path.is_dir() else item.name
        if item.name == MANIFEST:
            continue  # it holds times; the files beside it say what the directory is
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
    """Write JSON so that a reader sees the old file or the new one, never a part (temporary name, fsync, rename)."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
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


def require_disk(out: Path, needed: int, what: str) -> None:
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
            "free some space or choose another --out."
        )


class StageOutput:
    """The life of one output directory; use as a context manager around the work.

    >>> output = StageOutput(config.out, "prune", config, {"checkpoint": fingerprint(path)})
    >>> if output.result is None:
    ...     with output:
    ...         (output.partial / "model.safetensors").write_bytes(...)
    ...         output.commit({"params_after": 1})

    Construction decides and checks, without touching the disk: `result` is set when OUT is complete and up to date;
    `resuming` when OUT.partial holds work of the same key. Entering creates or empties OUT.partial.
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
        self.partial = out.with_name(out.name + ".partial")
        self.key = digest([stage, config.key(), self.inputs])
        self.result: dict[str, Any] | None = None
        self.resuming = False
        self._lock: int | None = None
        self._began = time.time()
        self._inspect_out()
        self._inspect_partial()

    def _inspect_out(self) -> None:
        if self.out.is_symlink() or self.out.exists():
            if not self.out.is_dir():
                raise OutputError(f"{self.out} is a file; choose another --out.")
            manifest = read_manifest(self.out)
            if manifest is not None and manifest.get("key") == self.key:
                self.result = manifest["result"]
            elif any(self.out.iterdir()) and not self.force:
                made = f"the result of another {manifest.get('stage')} run" if manifest else "files that are not ours"
                raise OutputError(f"{self.out} already holds {made}; choose another --out or add --force to replace it.")

    def _inspect_partial(self) -> None:
        if not self.partial.exists():
            return
        try:
            intent = json.loads((self.partial / INTENT).read_text("utf-8"))
        except (OSError, ValueError):
            intent = None
        if intent is None and any(self.partial.iterdir()) and not self.force:
            raise OutputError(f"{self.partial} holds files that are not ours; move them away or add --force.")
        self.resuming = self.resumable and intent is not None and intent.get("key") == self.key

    def __enter__(self) -> Self:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.exists() and not self.resuming:
            self._acquire()
            for item in self.partial.iterdir():
                if item.name != LOCK:
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        else:
            self.partial.mkdir(exist_ok=True)
            self._acquire()
        if not self.resuming:
            write_json(self.partial / INTENT, {"stage": self.stage, "key": self.key})
        return self

    def _acquire(self) -> None:
        """A kernel lock on the partial directory: it dies with the process, so none is ever stale."""
        self._lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise OutputError(f"Another process is writing {self.partial}; wait for it or choose another --out.") from None

    def commit(self, result: Mapping[str, Any]) -> None:
        """Write the manifest, make everything durable, and let OUT appear."""
        for name in (INTENT, LOCK):
            (self.partial / name).unlink(missing_ok=True)
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "minitron": __version__,
            "versions": library_versions(),
            "config": self.config.to_json(),
            "inputs": self.inputs,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._began)),
            "seconds": round(time.time() - self._began, 3),
            "result": dict(result),
        }
        sync_tree(self.partial)
        write_json(self.partial / MANIFEST, manifest)
        self._publish()
        self.result = manifest["result"]

    def _publish(self) -> None:
        if self.out.exists():  # empty, or --force was given
            aside = self.out.with_name(self.out.name + ".replaced")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.out, aside)
            os.rename(self.partial, self.out)
            shutil.rmtree(aside)
        else:
            os.rename(self.partial, self.out)
        sync_directory(self.out.parent)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if kind is None:
            return
        if self.partial.exists() and (not self.resumable or isinstance(error, MinitronError) and error.exit_code == 2):
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = f"; what {self.partial} holds is valid and the same command resumes" if self.resumable else ""
            raise RunError(f"The disk filled up while writing {self.partial}{kept}; free some space and run again.") from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    import platform
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
