"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SHARED, make_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny random Llama checkpoint without a tokenizer."""
    return make_model(tmp_path / "llama")


@pytest.fixture(autouse=True)
def _loud_progress() -> Iterator[None]:
    """--quiet in one test must not silence the next."""
    from minitron_cli.runtime.progress import set_quiet

    yield
    set_quiet(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the development data are skipped where it is absent."""
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared_data"):
            item.add_marker(pytest.mark.skip(reason="the development data folder is absent"))
