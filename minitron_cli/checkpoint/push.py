"""Upload a finished checkpoint to the Hub. What would fail is found out before any work; the token is never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from minitron_cli.errors import ConfigError, RunError
from minitron_cli.runtime.progress import say

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

LEFT_OUT = ["minitron.json", "*.tmp", "state.*", ".*", ".*/**", "log.jsonl"]
"""The manifest holds paths of this machine; what others need of it is in the model card."""


def _api(token: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="minitron")


def require_hub(repository: str) -> None:
    """Find out whether an upload can work: name, network, token and its rights.

    Raises:
        ConfigError: it cannot, with what to do.
    """
    asked = f"--push-to-hub {repository}"
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{asked}: write OWNER/NAME, such as my-name/my-model.")
    who = _who(asked)
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ConfigError(f"{asked}: the access token may only read; make one with write access and set HF_TOKEN.")


def _who(asked: str) -> dict[str, Any]:
    """Whose token it is, as the Hub tells."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    token = _token()
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{asked}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it or leave this out.")
    if token is None:
        raise ConfigError(
            f"{asked}: no access token was found; run `hf auth login`, or set HF_TOKEN to one with write access."
        )
    try:
        found: dict[str, Any] = _api(token).whoami()
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(f"{asked}: the Hub does not accept the access token; make a new one.") from None
        raise ConfigError(f"{asked}: the Hub answered with status {status}; try again later.") from None
    except Exception as error:  # no network, proxy, time-out: the client raises many kinds
        raise ConfigError(
            f"{asked}: the Hub did not answer ({type(error).__name__}); check the network or leave this out."
        ) from None
    return found


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def push(directory: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload a complete checkpoint; files that the Hub has already are not sent again. The page's address.

    Raises:
        RunError: it failed; the checkpoint is whole, and the same command tries again.
    """
    if os.environ.get("RANK", "0") != "0":  # one process of a torchrun uploads
        return ""
    try:
        api = _api(_token() or "")
        api.create_repo(repository, private=not public, repo_type="model", exist_ok=True)
        say(f"Uploading {directory} to {repository} ...")
        api.upload_folder(
            repo_id=repository, folder_path=str(directory), ignore_patterns=LEFT_OUT, commit_message=message
        )
    except Exception as error:  # as above; the message may hold request headers, so only its kind is told
        raise RunError(
            f"{directory} is complete, but uploading it to {repository} failed ({type(error).__name__}); "
            "the same command tries again."
        ) from None
    address = f"https://huggingface.co/{repository}"
    say(f"Uploaded: {address}")
    return address


def push_file(path: Path, repository: str) -> None:
    """Upload one file of a checkpoint that was uploaded before, such as its card with an evaluation.

    Raises:
        RunError: it failed.
    """
    try:
        _api(_token() or "").upload_file(
            path_or_fileobj=str(path), path_in_repo=path.name, repo_id=repository, commit_message=f"Update {path.name}"
        )
    except Exception as error:
        raise RunError(f"{path} could not be uploaded to {repository} ({type(error).__name__}).") from None
