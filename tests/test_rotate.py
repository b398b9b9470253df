"""A rotated stream without a cut is the same model; norms are scaled to the energy that stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import logits, make_model
from helpers_chain import make_data
from helpers_tokenizer import make_tokenizer
from safetensors.numpy import load_file, save_file
from tiny import TINY
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.checkpoint.verify import check_structure
from minitron_cli.config.importance import ImportanceConfig, Statistic
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ConfigError, FamilyError, InputError
from minitron_cli.families import FAMILIES, family_for
from minitron_cli.importance import stream as stream_module
from minitron_cli.importance.residual import ResidualStream, directions, norm_taps, stream_norms
from minitron_cli.importance.stage import run_importance
from minitron_cli.importance.store import load_basis
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune.plan import PrunePlan, describe
from minitron_cli.prune.residual import require_readers
from minitron_cli.prune.rotate import gram, halfway
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.search.measure import cut_in_memory
from minitron_cli.shape import Shape
from minitron_cli.tokens import TokenDataset, batch_rows

IDS = torch.randint(3, 20, (2, 24), generator=torch.Generator().manual_seed(0))
ROTATABLE = {name: config for name, config in TINY.items() if family_for(config).readers}
CPU = torch.device("cpu")
SAMPLES = 6


def scored(
    directory: Path, family: str, *, stream: bool = False, collect: tuple[Statistic, ...] = (), **changes: Any
) -> tuple[Path, Path]:
    """A tiny model of the family and its importance with directions."""
    source, data, out = directory / "model", directory / "data", directory / f"importance-{stream}"
    if not source.exists():
        make_tokenizer(source)
        make_model(source, family, vocab_size=len(load_tokenizer(source)), **changes)
        make_data(data, source)
    run_importance(
        ImportanceConfig(
            checkpoint=str(source), data=data, out=out, samples=SAMPLES, batch_size=4, loss_samples=0, stream=stream,
            collect=collect or (("directions",) if family_for(TINY[family]).readers else ("none",)),
        )
    )  # fmt: skip
    return source, out


def rotated(source: Path, importance: Path, out: Path, **options: Any) -> PruneConfig:
    return PruneConfig(checkpoint=str(source), importance=importance, out=out, rotate="on", **options)


@pytest.mark.parametrize("family", ROTATABLE)
def test_rotated_without_a_cut_is_the_same_function(family: str, tmp_path: Path) -> None:
    """Every family that can: biases, 1 + w, embedding scales, fused projections, tied heads."""
    source, importance = scored(tmp_path, family)
    hidden = Checkpoint(source).shape["hidden"]
    result = run_prune(rotated(source, importance, tmp_path / "out", hidden=hidden, untie=True))
    # Run in fp64: what is left is the rounding of the new weights to fp32.
    before, after = (logits(path, IDS) for path in (source, tmp_path / "out"))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    norms = [changed.get_parameter(name) for name, _, _ in stream_norms(Checkpoint(source).shape)]
    offset = Checkpoint(source).shape.family.norm.offset
    assert all(bool((norm == 1.0 - offset).all()) for norm in norms)
    tied = bool(TINY[family].get("tie_word_embeddings"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    table = changed.get_input_embeddings().weight.numel()
    assert result.params_after - result.params_before == (table if tied else 0)
    assert check_structure(tmp_path / "out") == result.params_after


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_a_rotated_cut_is_the_rotated_model_with_directions_left_out(family: str, tmp_path: Path) -> None:
    """Cutting hidden while rotating equals rotating first and cutting the last channels then; in memory as in files."""
    source, importance = scored(tmp_path, family)
    shape = Checkpoint(source).shape
    sizes = {"hidden": shape["hidden"] - 12, "ffn": 40, "kv_heads": 2, "head_dim": 8, "layers": 3}
    config = rotated(source, importance, tmp_path / "out", rescale="off", untie=True, **sizes)
    plan = plan_prune(config)
    run_prune(config)
    run_prune(rotated(source, importance, tmp_path / "whole", rescale="off", untie=True, hidden=shape["hidden"]))
    checkpoint = Checkpoint(tmp_path / "whole")
    later = replace(
        plan,
        rotate=False,
        untie=False,
        statistics="",
        sizes_before=dict(checkpoint.shape.sizes),
        params_before=checkpoint.shape.params,
    )
    expected = cut_in_memory(checkpoint, later, CPU, torch.float32)
    found = cut_in_memory(Checkpoint(source), plan, CPU, torch.float32)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert expected.state_dict().keys() == found.state_dict().keys() == written.state_dict().keys()
    for name, value in written.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


TIED = [name for name, config in ROTATABLE.items() if config.get("tie_word_embeddings")]


@pytest.mark.parametrize("family", TIED)
def test_a_shared_table_is_exact_where_the_last_norm_scales_all_channels_alike(family: str, tmp_path: Path) -> None:
    """Then embedding and head differ by a number: one table serves both, and the model is that of two tables."""
    source, importance = scored(tmp_path, family)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:] = 0.7
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    importance = scored(tmp_path, family, stream=True)[1]
    cut = Checkpoint(source).shape["hidden"] - 12
    tied = run_prune(rotated(source, importance, tmp_path / "tied", hidden=cut))
    untied = run_prune(rotated(source, importance, tmp_path / "untied", hidden=cut, untie=True))
    one, two = (logits(tmp_path / name, IDS) for name in ("tied", "untied"))
    assert (one - two).abs().max() < 1e-5 * two.abs().max()
    assert untied.params_after - tied.params_after == cut * Checkpoint(source).shape["vocab"]
    assert check_structure(tmp_path / "tied") == tied.params_after
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is not False


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_shared_table_lies_between_embedding_and_head(family: str, tmp_path: Path) -> None:
    """Against the plain formula, and least squares for a table of unrelated channels by a general solver."""
    source, importance = scored(tmp_path, family, tie_word_embeddings=True)
    hidden = Checkpoint(source).shape["hidden"]
    run_prune(rotated(source, importance, tmp_path / "out", hidden=hidden - 12, rescale="off"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    offset = Checkpoint(source).shape.family.norm.offset
    basis = load_basis(importance, hidden, hidden - 12)
    table, weight = (torch.from_numpy(before[name]) for name in ("model.embed_tokens.weight", "model.norm.weight"))
    weight = weight + offset
    expected = (table + table * weight / weight.mean()) / 2 @ basis
    torch.testing.assert_close(torch.from_numpy(after["model.embed_tokens.weight"]), expected, rtol=1e-5, atol=1e-6)
    assert (halfway(weight) / halfway(weight)[0]).std() > 0.01
    shared, head = expected, (table * weight) @ basis
    solved = torch.linalg.lstsq(shared.t()[:, :, None], head.t()[:, :, None]).solution.flatten()
    found = torch.from_numpy(after["model.norm.weight"]) + offset
    torch.testing.assert_close(found, solved, rtol=1e-4, atol=1e-5)


def test_products_of_a_table_are_summed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model", "llama")
    checkpoint = Checkpoint(source)
    name = "model.embed_tokens.weight"
    table = checkpoint.read(name).double()
    monkeypatch.setattr("minitron_cli.prune.rotate.BLOCK_BYTES", 7 * 4 * table.shape[1])
    torch.testing.assert_close(gram(checkpoint.entries[name]), table.t() @ table, rtol=1e-5, atol=1e-6)


def test_nothing_is_turned_where_no_hidden_unit_leaves_a_shared_table(tmp_path: Path) -> None:
    """One table would not be exact, and directions that all stay gain nothing: the model stays as it is."""
    source, importance = scored(tmp_path, "llama", tie_word_embeddings=True)
    hidden = Checkpoint(source).shape["hidden"]
    run_prune(rotated(source, importance, tmp_path / "out", hidden=hidden))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(np.array_equal(value, after[name]) for name, value in before.items())


def test_a_saved_plan_rotates_alike(tmp_path: Path) -> None:
    """`--plan` gives the same bytes; without the directions it says where they must be named."""
    source, importance = scored(tmp_path, "llama")
    config = rotated(source, importance, tmp_path / "out", hidden=36)
    plan = plan_prune(config)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    run_prune(config)
    again = PruneConfig(checkpoint=str(source), plan=tmp_path / "plan.json", out=tmp_path / "again")
    run_prune(again)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    importance.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--importance"):
        run_prune(replace(again, out=tmp_path / "third"))
    run_prune(replace(again, out=tmp_path / "third", importance=tmp_path / "moved"))


@pytest.mark.parametrize("family", ["llama", "gemma", "nemotron", "olmo2", "opt"])
def test_statistics_are_those_of_what_norms_read(family: str, tmp_path: Path) -> None:
    """Against sums over recorded states, and streamed as in memory."""
    source, importance = scored(tmp_path, family)
    found = load_file(importance / "statistics.safetensors")
    split = TokenDataset(tmp_path / "data").split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, SAMPLES, len(split))))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    shape = Checkpoint(source).shape
    entered: dict[str, torch.Tensor] = {}
    for placed in norm_taps(model, shape):
        placed.module.register_forward_pre_hook(
            lambda module, args, name=placed.tap.module: entered.__setitem__(name, args[0].double().flatten(0, -2))
        )
    with torch.no_grad():
        model(ids)
    moment = torch.zeros(shape["hidden"], shape["hidden"], dtype=torch.float64)
    _, streamed = scored(tmp_path, family, stream=True)
    for name, values in load_file(streamed / "statistics.safetensors").items():
        if name != "directions.basis":  # directions of equal energy may turn into each other
            np.testing.assert_allclose(values, found[name], rtol=1e-6, atol=1e-9, err_msg=name)
    assert {name for name in found if name.startswith("energy/")} == {f"energy/{name}.weight" for name in entered}
    for name, states in entered.items():
        if shape.family.norm.kind == "layer":
            states = states - states.mean(-1, keepdim=True)
        states = states / states.square().mean(-1, keepdim=True).sqrt()
        np.testing.assert_allclose(found[f"energy/{name}.weight"], states.square().mean(0).numpy(), rtol=1e-4)
        moment += states.t() @ states
    if not shape.family.readers:
        assert "directions.basis" not in found
        return
    shares = directions(moment)["directions.energy"]
    np.testing.assert_allclose(found["directions.energy"], shares, rtol=1e-4, atol=1e-7)
    basis = torch.from_numpy(found["directions.basis"]).double()
    assert (basis.t() @ basis - torch.eye(len(basis))).abs().max() < 1e-6
    along = (basis.t() @ moment @ basis / moment.trace()).diagonal()
    np.testing.assert_allclose(along.numpy(), shares, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "qwen2", "nemotron", "opt"])
def test_rescaled_norms_put_out_what_they_did(family: str, tmp_path: Path) -> None:
    """The mean square over kept channels of what a norm puts out stays, as one number per norm can make it."""
    source, importance = scored(tmp_path, family)
    shape = Checkpoint(source).shape
    sizes = {"hidden": 2 * shape["hidden"] // 3 // 12 * 12}
    if shape.family.coupled:
        sizes = {"hidden": 24, "heads": 3}
    plans = {
        how: plan_prune(
            PruneConfig(
                checkpoint=str(source), importance=importance, out=tmp_path / "x", rescale=how, rotate="off", **sizes
            )
        )
        for how in ("auto", "measured", "analytic", "off")
    }
    assert plans["measured"].rescale != plans["analytic"].rescale
    assert not plans["off"].rescale and not plans["auto"].rescale and plans["off"].keep == plans["measured"].keep
    energies, kept = load_file(importance / "statistics.safetensors"), plans["auto"].keep["hidden"]
    ratio = shape["hidden"] / len(kept)
    tied_scale = shape.family.embed_scale and TINY[family].get("tie_word_embeddings")
    for name, _, layer in stream_norms(shape):
        energy = energies[f"energy/{name}"]
        last = np.sqrt(1 / ratio) if tied_scale and layer is None else 1.0
        assert plans["measured"].rescale[name] == pytest.approx(
            np.sqrt(ratio * energy[kept].sum() / energy.sum()) * last
        )
        assert plans["analytic"].rescale[name] == pytest.approx(np.sqrt(ratio) * last)
    scaled, plain = (cut_in_memory(Checkpoint(source), plans[how], CPU, torch.float32) for how in ("measured", "off"))
    for name, value in scaled.state_dict().items():
        factor, offset = plans["measured"].rescale.get(name, 1.0), shape.family.norm.offset
        offset = offset if any(name == norm for norm, _, _ in stream_norms(shape)) else 0.0
        if not (tied_scale and name == "lm_head.weight"):
            torch.testing.assert_close(value + offset, (plain.state_dict()[name] + offset) * factor)


def test_gemmas_embeddings_enter_as_large_as_before(tmp_path: Path) -> None:
    """sqrt(hidden) shrinks with hidden; the tied head, made of the same table, must not notice."""
    source, importance = scored(tmp_path, "gemma")
    config = PruneConfig(
        checkpoint=str(source), importance=importance, out=tmp_path / "x", hidden=36, rescale="analytic", rotate="off"
    )
    plan = plan_prune(config)
    original = AutoModelForCausalLM.from_pretrained(source)
    pruned = cut_in_memory(Checkpoint(source), plan, CPU, torch.float32)
    kept = plan.keep["hidden"]
    with torch.no_grad():
        entering, before = (
            model.model(IDS, output_hidden_states=True).hidden_states[0] for model in (pruned, original)
        )
        torch.testing.assert_close(entering, before[..., kept])
        states = torch.randn(3, 44)
        states[:, [unit for unit in range(44) if unit not in kept]] = 0
        wide, narrow = (m.lm_head(m.model.norm(x)) for m, x in ((original, states), (pruned, states[:, kept])))
        torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rotated_norms_are_rescaled_to_the_energy_of_the_directions(family: str, tmp_path: Path) -> None:
    """By default; each norm the same, and Gemma's table. Where that stays the head, the norm before takes it back."""
    source, importance = scored(tmp_path, family)
    shape = Checkpoint(source).shape
    hidden = shape["hidden"] - 12
    config = rotated(source, importance, tmp_path / "out", hidden=hidden, untie=True)
    plan = plan_prune(config)
    shares = load_file(importance / "statistics.safetensors")["directions.energy"]
    factor = np.sqrt(shape["hidden"] * shares[:hidden].sum() / hidden)
    assert {name: pytest.approx(factor) for name, _, _ in stream_norms(shape)}.items() <= plan.rescale.items()
    run_prune(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.norm.weight[0].item() + shape.family.norm.offset == pytest.approx(factor, rel=1e-6)
    growth = np.sqrt(shape["hidden"] / hidden) if shape.family.embed_scale else 1.0
    shared = plan_prune(replace(config, untie=False)).rescale
    assert shared["model.norm.weight"] == pytest.approx(factor / growth)
    basis = torch.from_numpy(load_file(importance / "statistics.safetensors")["directions.basis"])[:, :hidden]
    table = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight, table @ basis * growth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_stopped_pass_goes_on(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are part of the state: the same bytes as undisturbed."""
    source, expected = scored(tmp_path, "llama", stream=stream)
    config = ImportanceConfig(
        checkpoint=str(source), data=tmp_path / "data", out=tmp_path / "again", samples=SAMPLES, batch_size=4,
        loss_samples=0, stream=stream, collect=("directions",), save_every=1,
    )  # fmt: skip
    heard, count = ResidualStream.heard, 0

    def stops(self: ResidualStream, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 12:  # in the second batch, or the second layer
            raise KeyboardInterrupt
        heard(self, *arguments)

    monkeypatch.setattr(stream_module, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(ResidualStream, "heard", stops)
    with pytest.raises(KeyboardInterrupt):
        run_importance(config)
    run_importance(config)
    files = [(out / "statistics.safetensors").read_bytes() for out in (expected, tmp_path / "again")]
    assert files[0] == files[1]


def test_processes_add_their_moments(tmp_path: Path) -> None:
    """Two halves, joined as a group joins them, are the whole."""
    source, _ = scored(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    shape = Checkpoint(source).shape
    taps = norm_taps(model, shape)
    whole, first, second = (ResidualStream(shape, taps, CPU, directions=True) for _ in range(3))
    states = torch.randn(4, 5, 48)
    for stream, rows in ((whole, states), (first, states[:2]), (second, states[2:])):
        for placed in taps:
            stream.heard(placed, rows)
    moments = [each.moment for each in (first, second)]

    class Pair:
        size = 2

        def total(self, tensor: torch.Tensor) -> torch.Tensor:
            return moments[0] + moments[1]

    first.merge_over(Pair())  # type: ignore[arg-type]
    torch.testing.assert_close(first.moment, whole.moment, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_nothing_cut_is_nothing_rescaled(family: str, tmp_path: Path) -> None:
    source, importance = scored(tmp_path, family)
    plan = plan_prune(
        PruneConfig(checkpoint=str(source), importance=importance, out=tmp_path / "x", ffn=40, rescale="measured")
    )
    assert plan.rescale == {}


@pytest.mark.parametrize("family", [name for name in TINY if name not in ROTATABLE])
def test_streams_that_cannot_be_rotated_are_refused(family: str) -> None:
    shape = Shape.of(TINY[family])
    with pytest.raises(FamilyError, match=r"cannot be rotated: .*; leave out --rotate") as caught:
        require_readers(shape)
    assert ("layer norms" in str(caught.value)) == (shape.family.norm.kind == "layer")


def test_refused_before_anything_is_read(tmp_path: Path) -> None:
    wanted = ImportanceConfig(
        checkpoint=str(make_model(tmp_path / "opt", "opt")), data=tmp_path, out=tmp_path / "i", collect=("directions",)
    )
    with pytest.raises(FamilyError, match="leave out --collect directions"):
        run_importance(wanted)
    (tmp_path / "importance").mkdir()
    source = make_model(tmp_path / "model", "nemotron")
    with pytest.raises(FamilyError, match="layer norms"):
        plan_prune(rotated(source, tmp_path / "importance", tmp_path / "out", hidden=40))
    (source / "model.safetensors").unlink()
    with pytest.raises(FamilyError, match="layer norms"):
        plan_prune(rotated(source, tmp_path / "importance", tmp_path / "out", hidden=40))


def test_sizes_alone_count_the_new_head(tmp_path: Path) -> None:
    """config.json without weights: the tied head's own matrix is in the count."""
    source, importance = scored(tmp_path, "llama", tie_word_embeddings=True)
    config = rotated(source, importance, tmp_path / "out", hidden=36, untie=True)
    expected = plan_prune(config)
    bare = plan_prune(replace(config, rotate="off", untie=False))
    head = 36 * expected.sizes["vocab"]
    assert expected.params_after - bare.params_after == head
    assert f"matrix of its own, {head:,} parameters" in describe(expected)
    assert plan_prune(replace(config, untie=False)).params_after == bare.params_after
    (source / "model.safetensors").unlink()
    assert plan_prune(config).params_after == expected.params_after


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    source, importance = scored(tmp_path, "llama")
    with pytest.raises(ConfigError, match="--hidden"):
        rotated(source, importance, tmp_path / "out", ffn=40)
    with pytest.raises(ConfigError, match="--importance"):
        plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "out", hidden=36, rotate="on"))
    with pytest.raises(InputError, match="--rescale analytic"):
        plan_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "out", hidden=36, rescale="measured"))
    with pytest.raises(ConfigError, match="--untie says what becomes of the head"):
        PruneConfig(checkpoint=str(source), out=tmp_path / "out", hidden=36, untie=True)
    with pytest.raises(ConfigError, match="A plan says itself"):
        PruneConfig(checkpoint=str(source), out=tmp_path / "out", plan=tmp_path / "p", rotate="on")
    run_importance(
        ImportanceConfig(
            checkpoint=str(source), data=tmp_path / "data", out=tmp_path / "plain", samples=2, loss_samples=0,
            collect=("none",),
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="--collect directions"):
        plan_prune(rotated(source, tmp_path / "plain", tmp_path / "out", hidden=36))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_by_default_it_turns_what_can_be_turned(family: str, tmp_path: Path) -> None:
    """Where hidden channels leave and directions are known; importance gathers them where the family has a use."""
    source, importance = scored(tmp_path, family, collect=("auto",))
    hidden = Checkpoint(source).shape["hidden"]
    config = PruneConfig(checkpoint=str(source), importance=importance, out=tmp_path / "out", hidden=hidden - 12)
    assert plan_prune(config).rotate == (family == "llama")
    assert not plan_prune(replace(config, rotate="off")).rotate
    assert not plan_prune(replace(config, hidden=hidden, ffn=40)).rotate
    assert not plan_prune(replace(config, importance=None)).rotate


def test_declared_readers_are_all_that_reads() -> None:
    """Every tensor with a hidden dimension: a norm, one reader of one norm, a table, or a writer into the stream."""
    assert {family.name for family in FAMILIES if family.readers} == {
        "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3"
    }  # fmt: skip
    for family in FAMILIES:
        readers = [reader for each in family.readers.values() for reader in each]
        assert len(readers) == len(set(readers))
        norms = {
            name for name, tensor in family.tensors.items() if tensor.role == "norm" and tensor.dims == ("hidden",)
        }
        if not family.readers:
            continue
        assert norms == set(family.readers) and family.norm.kind == "rms" and not family.draft
        for name, tensor in family.tensors.items():
            reads = tensor.dims[-1] == "hidden" and len(tensor.dims) == 2 and name not in family.tied.values()
            assert reads == (name in readers), name
            assert tensor.dims.count("hidden") <= 1 and all(
                dim == "hidden" or "hidden" not in dim for dim in tensor.dims
            )
