"""Every family file against the stock class: names, sizes, roles, layer tags, taps, cache and counts.

The oracle is a tiny model of the stock class on the CPU: what `save_pretrained` writes is what is on disk.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, VARIANTS
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from minitron_cli.checkpoint.multimodal import open_shape
from minitron_cli.checkpoint.rotary import turning
from minitron_cli.errors import FamilyError, ShapeError
from minitron_cli.families import FAMILIES, family_for, text_section
from minitron_cli.families.expression import axes, parse, size
from minitron_cli.families.schema import Axis, Family, LayerRule, Tap, Tensor, formula, holds, lookup
from minitron_cli.shape import Shape

CONFIGS = Path(__file__).parents[2] / "shared" / "data" / "configs"

_DENSE = {
    "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_DEEPSEEK = {
    **_DENSE, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3, "first_k_dense_replace": 1,
    "kv_lora_rank": 11, "q_lora_rank": 13, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-4,
}  # fmt: skip
_NEMOTRON = {
    **_DENSE, "head_dim": 6, "mamba_num_heads": 9, "mamba_head_dim": 4, "n_groups": 3, "ssm_state_size": 5,
    "conv_kernel": 3, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 14, "n_routed_experts": 7,
    "num_experts_per_tok": 2, "chunk_size": 4, "hybrid_override_pattern": "M-*EM", "num_hidden_layers": 5,
}  # fmt: skip
_QWEN = {
    **_DENSE, "num_hidden_layers": 5, "head_dim": 16, "linear_num_key_heads": 3, "linear_num_value_heads": 6,
    "linear_key_head_dim": 10, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3, "num_experts": 7,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 14, "num_experts_per_tok": 2,
}  # fmt: skip
_ROUTED = {**_DENSE, "num_attention_heads": 10, "intermediate_size": 48, "num_experts_per_tok": 2}
_SPARSE = {**_ROUTED, "num_experts": 7, "moe_intermediate_size": 16}
_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]

CASES: dict[str, dict[str, Any]] = {
    **{name: {key: value for key, value in config.items() if key != "model_type"} for name, config in TINY.items()},
    **VARIANTS,
    "mixtral-tied": {**_ROUTED, "tie_word_embeddings": True, "num_local_experts": 7},
    "qwen2_moe-steps": {
        **_SPARSE, "shared_expert_intermediate_size": 18, "decoder_sparse_step": 2, "tie_word_embeddings": True
    },
    "qwen2_moe-list": {
        **_SPARSE, "shared_expert_intermediate_size": 18, "layer_types": _WINDOWS, "use_sliding_window": True,
        "sliding_window": 8,
    },
    "qwen2_moe-unbiased": {**_SPARSE, "shared_expert_intermediate_size": 18, "qkv_bias": False},
    "qwen3_moe-tied": {**_SPARSE, "head_dim": 6, "tie_word_embeddings": True},
    "qwen3_moe-windows": {**_SPARSE, "head_dim": 6, "use_sliding_window": True, "sliding_window": 8,
        "mlp_only_layers": [2]},
    "olmoe-tied": {**_ROUTED, "num_experts": 7, "tie_word_embeddings": True},
    "phimoe-tied": {**_ROUTED, "num_local_experts": 7, "tie_word_embeddings": True},
    "granitemoe-untied": {**_ROUTED, "num_local_experts": 7},
    "gpt_oss-tied": {
        **_ROUTED, "num_local_experts": 7, "head_dim": 6, "attention_bias": False, "tie_word_embeddings": True,
        "layer_types": _WINDOWS,
    },
    "deepseek_v3-query_tied": {**_DEEPSEEK, "q_lora_rank": None, "tie_word_embeddings": True},
    "deepseek_v3-biases": {**_DEEPSEEK, "attention_bias": True, "first_k_dense_replace": 0},
    "nemotron_h-pattern": _NEMOTRON,
    "nemotron_h-latent": {
        **_NEMOTRON, "moe_latent_size": 16, "mlp_bias": True, "use_bias": True, "use_conv_bias": False,
        "tie_word_embeddings": True, "attention_bias": True,
    },
    "nemotron_h-list": {
        **{key: value for key, value in _NEMOTRON.items() if key != "hybrid_override_pattern"},
        "layers_block_type": ["attention", "moe", "mamba", "mlp"],
    },
    "qwen3_next-given": _QWEN,
    "qwen3_next-lists": {
        **_QWEN, "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention",
        "linear_attention"], "mlp_only_layers": [1], "decoder_sparse_step": 2, "attention_bias": True,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tiny stock model, what it wrote, and what the family says of it."""

    model: Any
    given: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    family: Family

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def build(name: str, directory: Path) -> Case:
    model_type = name.split("-")[0]
    torch.manual_seed(0)
    # The grouped matrix product wants 16-byte strides, which sizes this small do not have.
    config = AutoConfig.for_model(model_type, **CASES[name], experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text("utf-8"))
    given = {"model_type": model_type, **CASES[name]}
    return Case(model, given, written, load_file(directory / "model.safetensors"), family_for(written))


_BUILT: dict[str, Case] = {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name: str = request.param
    if name not in _BUILT:
        _BUILT[name] = build(name, tmp_path_factory.mktemp(name))
    return _BUILT[name]


def differences(family: Family, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What the family's table and a checkpoint's header disagree on."""
    sizes = family.sizes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor, _ in family.expected(config):
        assert name not in expected, f"{name} declared twice"
        expected[name] = family.tensor_shape(tensor, sizes)
    return sorted(
        f"{name}: declared {expected.get(name)}, on disk {shapes.get(name)}"
        for name in expected.keys() | shapes.keys()
        if expected.get(name) != shapes.get(name)
    )


def declarations(family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every declaration of the table, alternatives included."""
    for pattern, tensor in family.tensors.items():
        here: Tensor | None = tensor
        while here is not None:
            yield pattern, here
            here = here.otherwise


def cases_of(family: Family) -> list[dict[str, Any]]:
    configs = [{"model_type": name.split("-")[0], **keys} for name, keys in CASES.items()]
    return [config for config in configs if family.answers_for(config)]


def test_the_table_is_what_the_stock_class_writes(case: Case) -> None:
    assert differences(case.family, case.config, case.shapes) == []


def test_a_sparse_config_means_what_the_stock_class_makes_of_it(case: Case) -> None:
    """`given` lacks every key that the class fills in, and holds the legacy spellings."""
    assert differences(case.family, case.given, case.shapes) == []
    assert case.family.sizes(case.given) == case.family.sizes(case.config)
    layers = case.family.sizes(case.given)["layers"]
    assert case.family.layer_tags(case.given, layers) == case.family.layer_tags(case.config, layers)


def test_params_are_those_of_the_stock_class(case: Case) -> None:
    expected = sum(parameter.numel() for parameter in case.model.parameters())
    assert Shape.of(case.config).params == Shape.of(case.given).params == expected


def test_buffers_are_the_saved_tensors_that_are_no_parameters(case: Case) -> None:
    declared = {n for n, tensor, _ in case.family.expected(case.config) if tensor.role == "buffer"}
    saved = {n for n, _ in case.model.named_buffers() if n in case.model.state_dict()}
    assert {re.sub(r"^backbone\.", "model.", name) for name in declared} == saved


def test_fresh_norm_weights_are_the_identity(case: Case) -> None:
    """A norm applies w + offset, and a new model's norms change nothing: the weights tell the offset."""
    for name, tensor, _ in case.family.expected(case.config):
        if tensor.role in ("norm", "query_norm"):
            norm = tensor.norm or case.family.norm
            # NemotronLayerNorm1P starts as nn.LayerNorm does, from ones: a fresh one doubles.
            fresh = 1 - norm.offset if case.family.name != "nemotron" else 1.0
            torch.testing.assert_close(case.tensors[name], torch.full_like(case.tensors[name], fresh))
            assert not norm.eps_key or norm.eps_key in case.config
            assert not norm.per or tensor.dims[0].startswith(norm.per + "*")


def test_a_norms_epsilon_is_the_modules(case: Case) -> None:
    for name, tensor, _ in case.family.expected(case.config):
        if tensor.role in ("norm", "query_norm"):
            norm = tensor.norm or case.family.norm
            module = case.model.get_submodule(re.sub(r"^backbone\.", "model.", name).removesuffix(".weight"))
            actual = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            assert actual == (case.config[norm.eps_key] if norm.eps_key else norm.eps)


def test_tied_tensors_are_written_once(case: Case) -> None:
    ties = bool(case.config.get("tie_word_embeddings")) and bool(case.family.tied)
    for copy, source in case.family.tied.items():
        assert source in case.tensors
        assert (copy in case.tensors) != ties
    assert (case.model.get_input_embeddings().weight is case.model.get_output_embeddings().weight) == ties


def test_layer_tags_are_the_stock_layer_types(case: Case) -> None:
    if any(rule.kind == "list" for rule in case.family.layer_rules):
        types = case.model.config.layer_types
        tags = case.family.layer_tags(case.config, case.family.sizes(case.config)["layers"])
        assert all(word in have for word, have in zip(types, tags, strict=True))


def resolved(case: Case) -> Iterator[tuple[Tap, str]]:
    """Every tap with its module path in every layer that has it."""
    full = case.family.with_defaults(case.config)
    tags = case.family.layer_tags(case.config, case.family.sizes(case.config)["layers"])
    for taps in case.family.taps.values():
        for tap in taps:
            if all(holds(full, condition) for condition in tap.conditions):
                layers = [number for number, have in enumerate(tags) if have.issuperset(tap.tags)]
                for layer in layers if "{layer}" in tap.module else layers[:1]:
                    yield tap, tap.module.replace("{layer}", str(layer))


def test_taps_see_what_they_declare(case: Case) -> None:
    seen: dict[tuple[str, str], int] = {}
    found = list(resolved(case))
    for tap, path in found:
        module = case.model.get_submodule(path)
        key = (path, tap.side)

        def read(_: object, inputs: tuple[Any, ...], output: Any, key: tuple[str, str] = key) -> None:
            value = inputs[0] if key[1] == "input" else output[0] if isinstance(output, tuple) else output
            seen[key] = value.shape[-1]

        module.register_forward_hook(read)
    with torch.no_grad():
        case.model(input_ids=torch.arange(1, 6)[None], use_cache=False)
    sizes = case.family.sizes(case.config)
    assert seen == {(path, tap.side): size(parse(tap.dims), sizes) for tap, path in found}


def test_the_cache_holds_what_is_declared(case: Case) -> None:
    with torch.no_grad():
        cache = case.model(input_ids=torch.arange(1, 6)[None], use_cache=True).past_key_values
    held = sum(
        part.numel()
        for layer in cache.layers
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(part, torch.Tensor)
    )
    assert held == 5 * case.family.cached_elements(case.config)
    states = [
        state
        for layer in cache.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
    ]
    assert sum(state.numel() for state in states) == Shape.of(case.config).state_bytes(1)


def test_rotation_covers_the_declared_fraction(case: Case) -> None:
    frequencies = {name: buffer for name, buffer in case.model.named_buffers() if name.endswith("inv_freq")}
    frequencies = {name: buffer for name, buffer in frequencies.items() if "original" not in name}
    rotary = case.family.rotary
    # FalconModel builds its rotation under ALiBi too, and leaves it unused.
    assert bool(frequencies) == (rotary is not None) or case.config.get("alibi")
    if rotary is not None:
        turn = turning(rotary, case.config, case.family.sizes(case.config)[rotary.axis])
        assert {2 * len(buffer) for buffer in frequencies.values()} == {turn}
        assert 0 < len(frequencies) <= max(len(rotary.sections), 1)


def test_gemma_scales_embeddings_by_the_declared_axis(case: Case) -> None:
    scale = getattr(case.model.get_input_embeddings(), "scalar_embed_scale", None)
    axis = case.family.embed_scale
    assert scale == (case.family.sizes(case.config)[axis] ** 0.5 if axis else None)
    assert not case.family.softcap_key or case.family.softcap_key in case.config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_file_is_coherent(family: Family) -> None:
    names = [axis.name for axis in family.axes]
    assert len(set(names)) == len(names)
    known = set(names)
    used = {axis for _, tensor in declarations(family) for dim in tensor.dims for axis in axes(parse(dim))}
    assert used <= known
    for taps in family.taps.values():
        assert all(axes(parse(tap.dims)) <= known for tap in taps)
    for axis in family.axes:
        assert not (axis.prunable and axis.why_not)
        assert not axis.within or axis.within in known
    assert all(axis in known and axes(parse(other)) <= known for axis, other in family.coupled.items())
    assert all(
        axis in known and (part.isdigit() or formula(part, dict.fromkeys(known, 1)) == 1)
        for axis, part in divisors(family)
    )
    assert all(source in family.tensors for source in family.tied.values())
    assert all(tensor.role == "norm" for _, tensor in declarations(family) if tensor.norm)


def divisors(family: Family) -> list[tuple[str, str]]:
    return [(rule.axis, rule.divisor) for rule in family.divides]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_the_stock_config(family: Family) -> None:
    stock = AutoConfig.for_model(family.model_types[0])
    for key, value in family.defaults.items():
        # full_attention_interval is consumed by the constructor, which leaves no trace of it but the layer types;
        # others are changed by the constructor (sliding_window where windows are off).
        found = (getattr(stock, key, None), getattr(type(stock), key, None))
        assert key == "full_attention_interval" or value in found, key
    assert not family.norm.eps_key or getattr(stock, family.norm.eps_key) == family.norm.eps
    if family.rotary and family.rotary.sections:
        thetas = {section: entry["rope_theta"] for section, entry in stock.rope_parameters.items()}
        assert thetas == {section: theta for section, (_, theta) in family.rotary.sections.items()}
    elif family.rotary:
        assert stock.rope_parameters["rope_theta"] == family.rotary.theta_default
        assert stock.rope_parameters.get("partial_rotary_factor", 1.0) == family.rotary.fraction


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_declaration_is_exercised_and_its_loss_is_noticed(family: Family) -> None:
    """The cases above have power: each declaration stands in one of them, and no wrong axis would fit."""
    standing: set[int] = set()
    for config in cases_of(family):
        standing |= {id(tensor) for _, tensor, _ in family.expected(config)}
    assert [pattern for pattern, tensor in declarations(family) if id(tensor) not in standing] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_two_axes_of_the_first_case_have_one_size(family: Family) -> None:
    shape = Shape.of(cases_of(family)[0])
    keyed = {axis.name: shape[axis.name] for axis in family.cut_axes if axis.prunable and axis.name not in shape.absent}
    assert len(set(keyed.values())) == len(keyed), keyed


def test_a_wrong_declaration_is_caught(case: Case) -> None:
    """Removing, resizing or adding any one declaration shows."""
    standing = {id(tensor) for _, tensor, _ in case.family.expected(case.config)}
    for pattern, tensor in case.family.tensors.items():
        rest = {name: other for name, other in case.family.tensors.items() if name != pattern}
        wrong = replace(tensor, dims=(f"{tensor.dims[0]} + 1", *tensor.dims[1:]))
        if id(tensor) in standing:
            for tensors in (rest, {**rest, pattern: wrong}):
                assert differences(replace(case.family, tensors=tensors), case.config, case.shapes), pattern
    extra = {**case.family.tensors, "extra.weight": Tensor(("hidden",))}
    assert len(differences(replace(case.family, tensors=extra), case.config, case.shapes)) == 1


def test_base_model_checkpoints_of_gpt2_lack_the_prefix(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model(**TINY["gpt2"])).save_pretrained(tmp_path)
    family = family_for({"model_type": "gpt2"})
    names = {family.prefix + name for name in load_file(tmp_path / "model.safetensors")}
    assert names == {name for name, _, _ in family.expected(TINY["gpt2"])}


def test_legacy_and_extra_tensors_of_published_checkpoints_are_named() -> None:
    gpt2, neox = family_for({"model_type": "gpt2"}), family_for({"model_type": "gpt_neox"})
    assert any(re.fullmatch(pattern, "h.11.attn.bias") for pattern in gpt2.ignored)
    assert not any(re.fullmatch(pattern, "h.11.attn.c_attn.bias") for pattern in gpt2.ignored)
    assert any(re.fullmatch(pattern, "gpt_neox.layers.0.attention.masked_bias") for pattern in neox.ignored)
    for name in ("nemotron_h", "qwen3_next"):
        assert family_for({"model_type": name}).dropped_notice("mtp.layers.0.eh_proj.weight", 4)


def test_only_layers_past_the_last_are_dropped() -> None:
    deepseek = family_for({"model_type": "deepseek_v3"})
    assert "multi-token" in str(deepseek.dropped_notice("model.layers.61.eh_proj.weight", 61))
    assert deepseek.dropped_notice("model.layers.60.eh_proj.weight", 61) is None
    assert deepseek.dropped_notice("model.norm.weight", 61) is None


@pytest.mark.shared_data
@pytest.mark.skipif(not CONFIGS.is_dir(), reason="no development data beside the checkout")
def test_published_configs_count_as_the_stock_classes_do() -> None:
    counts = json.loads((CONFIGS / "PARAM_COUNTS.json").read_text("utf-8"))
    known = {name for family in FAMILIES for name in family.model_types}
    found: dict[str, tuple[int, int]] = {}
    for name, entry in counts.items():
        config = json.loads((CONFIGS / name / "config.json").read_text("utf-8"))
        if entry["params"] is not None and (config["model_type"] in known or text_section(config)):
            found[name] = (open_shape(CONFIGS / name).params, entry["params"])
    hybrids = {"Nemotron-H-8B-Base-8K", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen3.5-35B-A3B"}
    assert len(found) >= 13 and hybrids <= found.keys()
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}


def rule_tags(rule: LayerRule, config: dict[str, Any], layers: int) -> list[str]:
    return [rule.tag(config, layer) for layer in range(layers)]


def test_the_five_kinds_of_layer_rules() -> None:
    words = {"in": "I", "out": "O"}
    config = {"list": ["x", "y"], "pattern": "MX", "indices": [1], "leading": 1, "period": 2}
    assert rule_tags(LayerRule("list", "list", {"x": "z"}), config, 2) == ["z", "y"]
    assert rule_tags(LayerRule("pattern", "pattern", {"M": "m", "X": "x"}), config, 2) == ["m", "x"]
    assert rule_tags(LayerRule("indices", "indices", words), config, 3) == ["O", "I", "O"]
    assert rule_tags(LayerRule("leading", "leading", words), config, 3) == ["I", "O", "O"]
    assert rule_tags(LayerRule("period", "period", words), config, 4) == ["O", "I", "O", "I"]


def test_a_rule_may_ask_another() -> None:
    period = LayerRule("", "period", {"in": "moe", "out": "dense"}, fixed=2)
    rule = LayerRule("only", "indices", {"in": "dense", "out": period}, absent=period)
    assert rule_tags(rule, {}, 4) == ["dense", "moe", "dense", "moe"]
    assert rule_tags(rule, {"only": [1]}, 4) == ["dense", "dense", "dense", "moe"]
    assert [step.key for step in rule.walk()] == ["only", "", ""]


@pytest.mark.parametrize(
    "broken", [{"layer_types": ["full_attention"]}, {"decoder_sparse_step": 0}, {"mlp_only_layers": 3}]
)
def test_senseless_layer_keys_are_the_files_fault(broken: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match="layer_types"):
        Shape.of({"model_type": "qwen3_next", **_QWEN, **broken}).params  # noqa: B018


def test_an_unknown_pattern_letter_is_refused() -> None:
    with pytest.raises(ShapeError, match="hybrid_override_pattern"):
        Shape.of({"model_type": "nemotron_h", **_NEMOTRON, "hybrid_override_pattern": "M?"}).params  # noqa: B018


def test_null_and_absent_differ() -> None:
    """DeepSeek-V3: an absent q_lora_rank is 1536, a null one means that queries have no latent."""
    absent = {"model_type": "deepseek_v3", **_DEEPSEEK}
    del absent["q_lora_rank"]
    assert Shape.of(absent)["q_rank"] == 1536
    assert Shape.of({**absent, "q_lora_rank": None})["q_rank"] == 0


def test_a_list_is_no_size_unless_its_length_is() -> None:
    assert Axis("layers", "n", length_of=("types",)).read({"n": 9, "types": "MM"}) == 2
    with pytest.raises(ShapeError, match="hidden_size"):
        Shape.of({"model_type": "llama", **_DENSE, "hidden_size": "40"})


def test_families_load_without_torch() -> None:
    code = "import sys, minitron_cli.families; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_readings() -> None:
    config = {"a": {"b": 2}, "flag": True, "word": "x"}
    assert (lookup(config, "a.b"), lookup(config, "a.c"), lookup(config, "flag.b")) == (2, None, None)
    assert holds(config, "flag") and holds(config, "!gone") and holds(config, "word=x") and holds(config, "word!=y")
    assert not (holds(config, "gone") or holds(config, "!flag") or holds(config, "word=y") or holds(config, "word!=x"))
    assert formula("4 * hidden", {"hidden": 3}) == 12
    with pytest.raises(ShapeError, match="zero"):
        formula("a // b", {"a": 1, "b": 0})


def test_an_unknown_family_names_the_proven_ones() -> None:
    with pytest.raises(FamilyError, match="llama") as caught:
        family_for({"model_type": "rwkv"})
    assert "gpt_oss" in str(caught.value)
