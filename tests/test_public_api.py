"""The public names: each exists, and none costs anything until used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import minitron_cli


@pytest.mark.parametrize("name", minitron_cli.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(minitron_cli, name)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'run_magic'"):
        minitron_cli.run_magic  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, minitron_cli; assert not {'torch', 'transformers', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
