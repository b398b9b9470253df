"""All families; a new one costs one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_cli.errors import FamilyError
from minitron_cli.families.bamba import BAMBA
from minitron_cli.families.cohere import COHERE
from minitron_cli.families.cohere2 import COHERE2
from minitron_cli.families.deepseek_v3 import DEEPSEEK_V3
from minitron_cli.families.exaone4 import EXAONE4
from minitron_cli.families.falcon import FALCON_ALIBI, FALCON_GROUPED, FALCON_GROUPED_ONE_NORM, FALCON_MULTI_QUERY
from minitron_cli.families.falcon_h1 import FALCON_H1
from minitron_cli.families.gemma import GEMMA
from minitron_cli.families.gemma2 import GEMMA2
from minitron_cli.families.gemma3_text import GEMMA3_TEXT
from minitron_cli.families.glm4 import GLM4
from minitron_cli.families.gpt2 import GPT2, GPT2_BY_LAYER
from minitron_cli.families.gpt_neox import GPT_NEOX
from minitron_cli.families.gpt_oss import GPT_OSS
from minitron_cli.families.granite import GRANITE
from minitron_cli.families.granitemoe import GRANITEMOE
from minitron_cli.families.llama import LLAMA
from minitron_cli.families.ministral import MINISTRAL
from minitron_cli.families.mistral import MISTRAL
from minitron_cli.families.mixtral import MIXTRAL
from minitron_cli.families.nemotron import NEMOTRON
from minitron_cli.families.nemotron_h import NEMOTRON_H
from minitron_cli.families.olmo import OLMO, OLMO_CLIPPED
from minitron_cli.families.olmo2 import OLMO2
from minitron_cli.families.olmo3 import OLMO3
from minitron_cli.families.olmoe import OLMOE, OLMOE_CLIPPED
from minitron_cli.families.opt import OPT, OPT_POST_NORM
from minitron_cli.families.phi import PHI, PHI_NORMED
from minitron_cli.families.phi3 import PHI3
from minitron_cli.families.phimoe import PHIMOE
from minitron_cli.families.qwen2 import QWEN2
from minitron_cli.families.qwen2_moe import QWEN2_MOE
from minitron_cli.families.qwen3 import QWEN3
from minitron_cli.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from minitron_cli.families.qwen3_moe import QWEN3_MOE
from minitron_cli.families.qwen3_next import QWEN3_NEXT
from minitron_cli.families.schema import Family
from minitron_cli.families.smollm3 import SMOLLM3
from minitron_cli.families.stablelm import STABLELM
from minitron_cli.families.starcoder2 import STARCODER2

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    PHI,
    PHI_NORMED,
    PHI3,
    NEMOTRON,
    OLMO,
    OLMO_CLIPPED,
    OLMO2,
    OLMO3,
    GRANITE,
    SMOLLM3,
    STARCODER2,
    STABLELM,
    COHERE,
    COHERE2,
    GLM4,
    EXAONE4,
    GPT2,
    GPT2_BY_LAYER,
    GPT_NEOX,
    OPT,
    OPT_POST_NORM,
    FALCON_MULTI_QUERY,
    FALCON_GROUPED,
    FALCON_GROUPED_ONE_NORM,
    FALCON_ALIBI,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    OLMOE_CLIPPED,
    PHIMOE,
    GRANITEMOE,
    GPT_OSS,
    DEEPSEEK_V3,
    NEMOTRON_H,
    BAMBA,
    FALCON_H1,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of a multimodal config.json that describes its text part, where a family explains it."""
    known = {name for family in FAMILIES for name in family.model_types}
    section = config.get("text_config")
    wraps = isinstance(section, Mapping) and section.get("model_type") in known
    return section if wraps and config.get("model_type") not in known else None


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that answers for a config.json.

    Raises:
        FamilyError: no family file names this model type, or it is that of a multimodal model around a text model.
    """
    model_type = config.get("model_type")
    section = text_section(config)
    if section is not None:
        raise FamilyError(
            f"This {model_type} checkpoint wraps a {section['model_type']} text model, and only that can be used here; "
            "extract it with `minitron prune CKPT --text-only --out DIR`."
        )
    for family in FAMILIES:
        if family.answers_for(config):
            return family
    variants = [family for family in FAMILIES if model_type in family.model_types]
    if variants:
        layouts = "; ".join(" and ".join(family.when) for family in variants)
        raise FamilyError(f"This {model_type} config has a layout that no family file explains (known: {layouts}).")
    known = ", ".join(sorted({name for family in FAMILIES if not family.draft for name in family.model_types}))
    raise FamilyError(
        f"No family file explains model_type {model_type!r} (minitron prunes: {known}); draft a family file with "
        "`minitron families draft CKPT`."
    )
