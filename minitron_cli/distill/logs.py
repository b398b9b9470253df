"""Numbers of each step: log.jsonl in the output, and TensorBoard or Weights & Biases where asked for.

A record is {"step", "tokens", "loss", "terms", "learning_rate", "gradient_norm", "tokens_per_second"} of one step, or
{"step", "validation"}. After a resume the log reads as if nothing had happened: what the lost steps wrote is cut.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from minitron_cli.errors import ConfigError
from minitron_cli.manifest import digest, sync_directory

LOG = "log.jsonl"
Record = Mapping[str, Any]


class Log(Protocol):
    """Somewhere records go."""

    def write(self, record: Record) -> None:
        """Add one."""

    def sync(self) -> None:
        """Put what was added on disk; called before a checkpoint is saved."""

    def close(self) -> None:
        """Finish; may be called twice."""


def require_log(name: str | None) -> None:
    """Insist that what `--log` asks for is installed.

    Raises:
        ConfigError: it is not.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(f"--log {name} needs a package that is not installed: pip install {name}.")


def open_logs(name: str | None, partial: Path, out: Path, step: int, validated: Collection[int]) -> list[Log]:
    """log.jsonl and what `--log` asks for, going on after `step`; `validated` are the steps whose validation counts.

    Raises:
        ConfigError: the service refuses.
    """
    logs: list[Log] = [JsonLines(partial / LOG, step, validated)]
    if name is None:
        return logs
    try:
        logs.append(TensorBoard(partial / "tensorboard", step) if name == "tensorboard" else WeightsAndBiases(out))
    except Exception as error:  # services fail in ways of their own: no login, no network
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"--log {name} cannot start: {told[0]}") from error
    return logs


class JsonLines:
    """A file with one JSON object per line."""

    def __init__(self, path: Path, step: int, validated: Collection[int]) -> None:
        kept = [line for line in _whole_lines(path) if _counts(json.loads(line), step, validated)]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), "utf-8")
        os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")
        sync_directory(path.parent)

    def write(self, record: Record) -> None:
        """Add a line, so that a reader sees it at once."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Also against a power cut."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _whole_lines(path: Path) -> Iterator[str]:
    """Lines as written; not the rest of one that a kill cut off."""
    if not path.exists():
        return
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            return
        if line.endswith("\n"):
            yield line


def _counts(record: Record, step: int, validated: Collection[int]) -> bool:
    return record["step"] in validated if "validation" in record else bool(record["step"] <= step)


def scalars(record: Record) -> dict[str, float]:
    """A record without its step, flat: `terms/kl` for each term."""
    flat = {name: value for name, value in record.items() if name not in ("step", "terms")}
    return flat | {f"terms/{name}": value for name, value in record.get("terms", {}).items()}


class TensorBoard:
    """Event files below a directory; steps after `step` of an earlier try are marked as void."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add each number."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run named after the output, which a resumed process continues; the service leaves out steps it knows."""

    def __init__(self, out: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="minitron", name=out.name, id=digest(str(out.absolute()))[:16], resume="allow"
        )

    def write(self, record: Record) -> None:
        """Send the numbers."""
        self._run.log(scalars(record), step=record["step"])

    def sync(self) -> None:
        """Nothing: the service's own process sends."""

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()
