"""The plan that a search chose, or the one of a size where it chose several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_cli.errors import ConfigError, InputError
from minitron_cli.manifest import read_manifest

SEARCH = "search.json"


def searched_plan(directory: Path, size: str | None) -> Path:
    """Where the plan lies.

    Args:
        size: as the search was told it; None where it searched for one.

    Raises:
        InputError: not a finished search.
        ConfigError: several sizes and none named, or not one of them.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("stage") != "search":
        raise InputError(f"{directory} is not a finished `minitron search`; run it first.")
    try:
        sizes: list[dict[str, Any]] = json.loads((directory / SEARCH).read_text("utf-8"))["sizes"]
        plans = {each["size"]: str(each["plan"]) for each in sizes}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory / SEARCH} cannot be read ({error}); run `minitron search` again.") from None
    if size is None and len(plans) > 1:
        named = ", ".join(f"--params {each}" for each in plans)
        raise ConfigError(f"{directory} chose a shape for each of {len(plans)} sizes; add one of {named}.")
    if size is not None and size not in plans:
        named = ", ".join(each for each in plans if each) or "one shape only, so leave --params out"
        raise ConfigError(f"{directory} has no choice for --params {size}; it has {named}.")
    return directory / (plans[size] if size is not None else next(iter(plans.values())))
