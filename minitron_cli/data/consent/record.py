"""The audit behind a corpus, for whoever trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_cli.data.consent.audit import CORPUS
from minitron_cli.errors import InputError
from minitron_cli.manifest import fingerprint, read_manifest
from minitron_cli.runtime.progress import say


def audit_of(source: str) -> dict[str, Any] | None:
    """The summary of the audit that wrote this source (its OUT/corpus, or a file below); None for any other source.

    A corpus that was changed since has no audit: that is said, and None returned.

    Raises:
        InputError: the source is the audit's own directory, whose verdicts are no text.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    path = path.resolve()
    if _audit_manifest(path) is not None:
        raise InputError(
            f"{source} is an audit, not a corpus; give {source}/{CORPUS}, which `data audit --filter` writes."
        )
    folder = next(
        (place for place in (path, *path.parents) if place.name == CORPUS and _audit_manifest(place.parent)), None
    )
    if folder is None:
        return None
    summary = dict((_audit_manifest(folder.parent) or {}).get("result") or {})
    if (summary.get("filter") or {}).get("corpus") != fingerprint(folder):
        say(f"{folder} was changed after its audit, which is therefore not recorded.")
        return None
    return summary


def _audit_manifest(directory: Path) -> dict[str, Any] | None:
    manifest = read_manifest(directory)
    return manifest if manifest is not None and manifest.get("stage") == "audit" else None
