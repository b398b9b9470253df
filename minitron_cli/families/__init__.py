"""All families; a new one costs one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_cli.errors import FamilyError
from minitron_cli.families.deepseek_v3 import DEEPSEEK_V3
from minitron_cli.families.gemma2 import GEMMA2
from minitron_cli.families.gpt2 import GPT2
from minitron_cli.families.gpt_neox import GPT_NEOX
from minitron_cli.families.gpt_oss import GPT_OSS
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.mistral import MISTRAL
from minitron_cli.families.nemotron_h import NEMOTRON_H
from minitron_cli.families.qwen3_next import QWEN3_NEXT
from minitron_cli.families.schema import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    GEMMA2,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    DEEPSEEK_V3,
    NEMOTRON_H,
    QWEN3_NEXT,
)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that answers for a config.json.

    Raises:
        FamilyError: no family file names this model type.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES if not family.draft for name in family.model_types))
    raise FamilyError(f"No family file explains model_type {model_type!r}; minitron prunes: {known}.")
