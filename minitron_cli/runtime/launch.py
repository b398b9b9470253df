"""What torchrun tells the processes it starts, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from minitron_cli.errors import ConfigError

NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
"""Variables of torchrun."""


def processes() -> int:
    """How many there are, this one among them; 1 without torchrun."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if processes() > 1 else 0


def local_processes() -> int:
    """How many of them share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1) if processes() > 1 else 1


def require_one_process(command: str) -> None:
    """For what does not run in several.

    Raises:
        ConfigError: it was started by torchrun.
    """
    if processes() > 1:
        raise ConfigError(f"`minitron {command}` runs in one process; start it without torchrun.")


@contextmanager
def unlaunched() -> Iterator[None]:
    """Within the block nothing here, in other libraries or in child processes knows of torchrun."""
    hidden = {
        name: os.environ.pop(name) for name in list(os.environ) if name in NAMES or name.startswith("TORCHELASTIC")
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def _number(name: str, default: int) -> int:
    try:
        return max(default, int(os.environ.get(name, default)))
    except ValueError:
        return default
