"""Family files against the stock class under every single change of a config, and the drafter against family files.

Sizes of one model cannot tell two axes of equal size apart; these tests change one number at a time.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from minitron_cli.cli import main
from minitron_cli.errors import CheckpointError
from minitron_cli.families import FAMILIES, family_for
from minitron_cli.families.expression import axes, parse, size
from minitron_cli.families.schema import Family, Norm, Tensor
from minitron_cli.models.draft import Draft, draft_family
from minitron_cli.models.draft_fit import Term, fit, product_text
from minitron_cli.models.draft_probe import cross_check, differences, observe, stock_values
from minitron_cli.models.draft_source import WIDTH, source

UNPUBLISHED = {
    # Published configs of the new architecture have one or two norms, and always run in parallel.
    "falcon-grouped": ("parallel_attn=False", "num_ln_in_parallel_attn="),
    "falcon-one_norm": ("parallel_attn=False", "num_ln_in_parallel_attn="),
}
"""Changes whose outcome the family need not declare."""

TOGETHER: dict[str, tuple[dict[str, int], ...]] = {
    "bamba": ({"mamba_n_heads": 8, "mamba_d_head": 12}, {"hidden_size": 96, "mamba_expand": 1}),
    "falcon_h1": ({"mamba_n_heads": 24, "mamba_d_head": 5}, {"mamba_d_ssm": 240, "mamba_d_head": 20}),
}
"""Numbers that the stock class accepts only in step."""

UNDECLARED = {
    "model_type": "arcee", "vocab_size": 67, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""A type of transformers that no family file declares: grouped queries, no gate in the MLP."""


@pytest.mark.parametrize("name", TINY)
def test_a_family_reproduces_every_change(name: str) -> None:
    """The strong form of the shape test: no swap of equal sizes survives, and every config key of an axis was moved."""
    family = family_for(TINY[name])
    found = cross_check(family, TINY[name])
    ignored = UNPUBLISHED.get(name, ())
    assert [line for line in found.disagreements if not any(change in line for change in ignored)] == []
    values = stock_values(TINY[name])
    spelled = {key: other for other, key in family.spellings.items() if other in values}
    keys = {spelled.get(axis.key, axis.key) for axis in family.axes}
    seen = set(found.seen)
    for numbers in TOGETHER.get(name, ()):
        assert differences(family, observe({**values, **numbers})) == []
        seen |= numbers.keys()
    assert {key for key in keys if values.get(key) is not None} <= seen


def swapped(family: Family, name: str, *dims: str) -> Family:
    return replace(family, tensors={**family.tensors, name: replace(family.tensors[name], dims=dims)})


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("mlp.gate_proj.weight", ("hidden", "ffn")),
        ("mlp.down_proj.weight", ("ffn", "hidden")),
        ("self_attn.k_proj.weight", ("kv_heads*group*head_dim", "hidden")),
        ("self_attn.v_proj.weight", ("kv_heads*kv_heads", "hidden")),
        ("self_attn.o_proj.weight", ("kv_heads*group*v_head_dim", "hidden")),
        ("input_layernorm.weight", ("ffn",)),
    ],
)
def test_a_swapped_axis_is_caught(name: str, dims: tuple[str, ...]) -> None:
    """Control: at this shape every one of these declarations has the right sizes, and each is wrong."""
    base = {
        **TINY["llama"], "hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 16,
    }  # fmt: skip
    if "kv_heads*kv_heads" in dims:
        base |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
    family = family_for(base)
    wrong = swapped(family, "model.layers.{layer}." + name, *dims)
    sizes = family.sizes(base)
    assert wrong.tensor_shape(wrong.tensors["model.layers.{layer}." + name], sizes) == family.tensor_shape(
        family.tensors["model.layers.{layer}." + name], sizes
    )
    assert cross_check(family, base).disagreements == ()
    assert any(name in line for line in cross_check(wrong, base).disagreements)


def test_an_exchanged_config_key_is_caught() -> None:
    base = {**TINY["llama"], "intermediate_size": TINY["llama"]["hidden_size"]}
    family = family_for(base)
    keys = {"hidden": "intermediate_size", "ffn": "hidden_size"}
    wrong = replace(family, axes=tuple(replace(axis, key=keys.get(axis.name, axis.key)) for axis in family.axes))
    assert cross_check(wrong, base).disagreements


def test_a_forgotten_condition_is_caught() -> None:
    family = family_for(TINY["llama"])
    name = "model.layers.{layer}.mlp.up_proj.bias"
    wrong = replace(family, tensors={**family.tensors, name: replace(family.tensors[name], conditions=())})
    assert any("mlp_bias=False" in line for line in cross_check(wrong, TINY["llama"]).disagreements)


_DRAFTS: dict[str, Draft] = {}


def drafted(name: str) -> Draft:
    if name not in _DRAFTS:
        _DRAFTS[name] = draft_family(UNDECLARED if name == "arcee" else TINY[name])
    return _DRAFTS[name]


def comparable(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dims, tensor.tags, frozenset(tensor.conditions), tensor.role, tensor.norm, tensor.otherwise


MARKED = {
    "llama": (),
    "mistral": (),
    "qwen2": (),
    "qwen3": (),
    "olmo2": (),
    "gemma2": (),
    "nemotron": (),
    "exaone4": (),
    "starcoder2": (),
    "phi3": ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"),
    "glm4": ("mlp.gate_up_proj.weight",),
    "gpt2": ("attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"),
    "gpt_neox": ("attention.query_key_value.weight", "attention.query_key_value.bias", "attention.dense.weight"),
}
"""What sizes alone cannot decide of each family, and the drafter must say so."""


@pytest.mark.parametrize("name", MARKED)
def test_a_draft_equals_the_shipped_table(name: str) -> None:
    """Names, expressions, conditions and roles; marked lines need only have the sizes."""
    draft, shipped = drafted(name), family_for(TINY[name])
    assert draft.family.tensors.keys() == shipped.tensors.keys()
    sizes = shipped.sizes(TINY[name])
    marked = {pattern for pattern in draft.checks if pattern in shipped.tensors}
    assert {pattern.partition("{layer}.")[2] for pattern in marked} == set(MARKED[name])
    for pattern, tensor in draft.family.tensors.items():
        if pattern in marked:
            assert draft.family.tensor_shape(tensor, sizes) == shipped.tensor_shape(shipped.tensors[pattern], sizes)
        else:
            assert comparable(tensor) == comparable(shipped.tensors[pattern]), pattern


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "nemotron", "phi3", "gpt2"])
def test_a_draft_knows_norms_ties_taps_and_couplings(name: str) -> None:
    draft, shipped = drafted(name).family, family_for(TINY[name])
    assert (draft.norm, draft.tied, draft.coupled) == (shipped.norm, shipped.tied, shipped.coupled)
    assert draft.taps == shipped.taps
    assert draft.draft and (draft.rotary is None) == (shipped.rotary is None)
    declared = {axis.name: (axis.key, axis.within) for axis in shipped.axes if axis.key}
    assert {axis.name: (axis.key, "") for axis in draft.axes if axis.key} == {
        name: (key, "") for name, (key, _) in declared.items()
    }


@pytest.mark.parametrize("name", [*MARKED, "arcee", "cohere", "opt", "stablelm", "falcon"])
def test_a_draft_explains_every_change(name: str) -> None:
    """What the drafter prints is held against the stock class like any shipped family."""
    assert not [note for note in drafted(name).notes if note.startswith(("disagrees", "not compared"))]


@pytest.mark.parametrize("name", ["arcee", "gpt2", "phi3", "gemma3_text", "opt"])
def test_the_source_is_the_draft(name: str, tmp_path: Path) -> None:
    """Importable, equal to the draft, every remark in it, and clean for the linter and the formatter."""
    draft = drafted(name)
    text = source(draft)
    file = tmp_path / "drafted.py"
    file.write_text(text, "utf-8")
    spec = importlib.util.spec_from_file_location("drafted", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [value for value in vars(module).values() if isinstance(value, Family)] == [draft.family]
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert text.count("# CHECK: ") == len(draft.notes) + sum(map(len, draft.checks.values()))
    config = Path(__file__).parents[1] / "pyproject.toml"
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--config", str(config), str(file)], capture_output=True, text=True
        )
        assert done.returncode == 0 or "No module named" in done.stderr, done.stdout + done.stderr


def test_layers_that_differ_get_tags_or_remarks() -> None:
    mixed = {
        "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 2, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 40,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 67,
    }  # fmt: skip
    draft = draft_family(mixed)
    expert = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    assert draft.family.tensors[expert].dims == ("expert_ffn", "hidden")
    assert draft.checks[expert] == ["only in layers 1, 3: write a LayerRule that says so"]
    assert draft.family.tensors["model.layers.{layer}.mlp.up_proj.weight"].dims == ("ffn", "hidden")


def test_lists_of_layer_words_become_rules() -> None:
    (rule,) = drafted("gemma2").family.layer_rules
    assert (rule.key, rule.kind) == ("layer_types", "list")
    tags = [rule.tag({}, layer) for layer in range(4)]
    assert tags == ["sliding_attention", "full_attention"] * 2


SIZES = [
    {"hidden": 48, "heads": 6, "kv_heads": 3, "head_dim": 16},
    {"hidden": 96, "heads": 6, "kv_heads": 3, "head_dim": 16},
    {"hidden": 48, "heads": 12, "kv_heads": 3, "head_dim": 16},
    {"hidden": 48, "heads": 6, "kv_heads": 6, "head_dim": 16},
    {"hidden": 48, "heads": 6, "kv_heads": 3, "head_dim": 32},
]


@pytest.mark.parametrize(
    "text",
    # Two terms, a coefficient, a constant.
    [
        "hidden",
        "heads*head_dim",
        "3*hidden",
        "heads*head_dim + 2*kv_heads*head_dim",
        "hidden + 2",
        "5",
        "heads + hidden",
    ],
)
def test_fit_finds_the_expression(text: str) -> None:
    (found,) = fit([size(parse(text), sizes) for sizes in SIZES], SIZES)
    again = " + ".join("*".join([str(term.count), *term.factors]) for term in found)
    assert [size(parse(again), sizes) for sizes in SIZES] == [size(parse(text), sizes) for sizes in SIZES]
    assert frozenset(name for term in found for name in term.factors) == axes(parse(text))


def test_fit_says_when_nothing_fits() -> None:
    assert fit([7, 14, 9, 7, 7], SIZES) == []
    assert fit([48, 48, 48, 48, 48], SIZES) == [(Term((), 48),)]


def test_fit_returns_all_that_fit_equally() -> None:
    sizes = [{"a": 4, "b": 4}, {"a": 8, "b": 8}]
    assert len(fit([4, 8], sizes)) == 2


def test_nesting_puts_heads_outside_channels() -> None:
    assert product_text(("head_dim", "group", "kv_heads")) == "kv_heads*group*head_dim"
    assert product_text(("expert_ffn", "experts")) == "experts*expert_ffn"


Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minitron", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, before)


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_families_prints_the_matrix(invoke: Invoke) -> None:
    code, out, _ = invoke("families", "--json")
    found = json.loads(out)["families"]
    assert code == 0 and [each["name"] for each in found] == [family.name for family in FAMILIES]
    assert all(each.keys() == {"name", "model_types", "axes"} for each in found)
    code, out, _ = invoke("families")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["family", *(each.name for each in FAMILIES)]


def test_draft_command(tmp_path: Path, invoke: Invoke) -> None:
    config = write_config(tmp_path / "new", **UNDECLARED)
    code, printed, _ = invoke("families", "draft", str(config))
    assert code == 0 and printed == source(drafted("arcee"))
    file = tmp_path / "arcee.py"
    code, out, _ = invoke("families", "draft", str(config / "config.json"), "--out", str(file), "--json")
    assert code == 0 and file.read_text() == printed
    assert json.loads(out)["checks"] == printed.count("CHECK: ")
    code, out, err = invoke("families", "draft", str(config), "--out", str(file))
    assert (code, out) == (2, "") and "never replaces a file" in err and file.read_text() == printed


def test_an_undeclared_type_names_the_drafter(tmp_path: Path, invoke: Invoke) -> None:
    config = write_config(tmp_path / "new", **UNDECLARED)
    code, out, err = invoke("inspect", str(config))
    assert (code, out) == (2, "") and "minitron families draft CKPT" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "no_such_model"}, "has no model type 'no_such_model'"),
        ({}, "has no model type None"),
        ({"model_type": "t5"}, "no causal LM class"),
        ({**UNDECLARED, "num_attention_heads": 7}, "heads"),
    ],
)
def test_draft_of_what_transformers_lacks(values: dict[str, Any], words: str, tmp_path: Path, invoke: Invoke) -> None:
    code, out, err = invoke("families", "draft", str(write_config(tmp_path / "new", **values)))
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1, err


def test_a_draft_norm_is_computed_not_named() -> None:
    """1 + w (in two kinds of norm) is seen in numbers."""
    assert drafted("gemma2").family.norm == Norm(offset=1.0)
    assert drafted("nemotron").family.norm.offset == 1.0
    with pytest.raises(CheckpointError):
        draft_family({"model_type": "no_such_model"})
