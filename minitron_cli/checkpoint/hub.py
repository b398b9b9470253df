"""From what the user typed to a directory: a local path, the built-in teacher, or a Hub snapshot."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from minitron_cli.errors import CheckpointError

BUILTIN = "builtin:"
"""`builtin:tiny-py` is the small teacher that comes with the installation."""

WANTED = [
    *("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
]


def is_local(reference: str) -> bool:
    """Whether a reference means a local path: it starts with `/`, `.` or `~`, or it exists."""
    return reference.startswith(("/", ".", "~")) or Path(reference).exists()


def resolve(reference: str | Path, *, config_only: bool = False) -> Path:
    """The directory of a checkpoint; downloads a Hub snapshot (safetensors and tokenizer files only) if needed.

    Raises:
        CheckpointError: no such directory, no such built-in, or the Hub cannot give it.
    """
    reference = str(reference)
    if reference.startswith(BUILTIN):
        return _builtin(reference.removeprefix(BUILTIN))
    if is_local(reference):
        path = Path(reference).expanduser()
        if not path.exists():
            raise CheckpointError(f"{reference} does not exist; give a checkpoint directory or a Hub id.")
        if path.is_file() and path.name == "config.json":
            return path.parent
        if not path.is_dir():
            raise CheckpointError(f"{reference} is a file; give the directory that holds config.json.")
        return path
    return _download(reference, ["config.json"] if config_only else WANTED)


def _builtin(name: str) -> Path:
    path = Path(str(files("minitron_cli"))) / "assets" / name
    if not path.is_dir():
        raise CheckpointError(f"builtin:{name} is not part of this installation; use builtin:tiny-py.")
    return path


def _download(reference: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except HFValidationError:
        raise CheckpointError(f"{reference} is neither an existing path nor a Hub id (owner/name).") from None
    except GatedRepoError:
        raise CheckpointError(f"{reference} is gated; accept its licence on the Hub and set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{reference} is neither a local directory nor a model on the Hub.") from None
    except Exception as error:  # offline, proxy, time-out: the Hub's client raises many kinds
        raise CheckpointError(
            f"{reference} is not a local path, and the Hub did not answer ({type(error).__name__}); "
            "check the network or give a local directory."
        ) from None
