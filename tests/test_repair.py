"""Projections fitted again: against least squares on recorded activations, the identity, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, make_model
from helpers_chain import make_data
from helpers_tokenizer import make_tokenizer
from safetensors.torch import load_file
from test_multimodal import make_wrapped
from tiny import TINY
from transformers import AutoModelForCausalLM

from minitron_cli.checkpoint.reader import Checkpoint
from minitron_cli.config.importance import ImportanceConfig
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ConfigError, FamilyError, InputError, ResourceError
from minitron_cli.families.schema import Tap
from minitron_cli.importance.stage import run_importance
from minitron_cli.models.load import load_model
from minitron_cli.models.streaming import StreamedModel
from minitron_cli.models.taps import first_tensor
from minitron_cli.models.tokenizer import load_tokenizer
from minitron_cli.prune import repair as repairing
from minitron_cli.prune.plan import PrunePlan
from minitron_cli.prune.repair import Repair, projections
from minitron_cli.prune.ridge import DAMPING, Moments, correction
from minitron_cli.prune.stage import plan_prune, run_prune
from minitron_cli.shape import Shape
from minitron_cli.tokens import TokenDataset, batch_rows

CPU = torch.device("cpu")
SAMPLES = 24
FAMILIES = ("llama", "gemma", "qwen2", "gemma2", "granite", "opt", "phi", "gpt2", "falcon-grouped")


def make_pair(directory: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    """A tiny model of the family, and text."""
    source, data = directory / "model", directory / "data"
    make_tokenizer(source)
    make_model(source, family, vocab_size=len(load_tokenizer(source)), **changes)
    return source, make_data(data, source)


def cut(source: Path, data: Path | None, out: Path, **options: Any) -> PruneConfig:
    shape = Checkpoint(source).shape
    sizes = {"ffn": shape["ffn"] // 2} if not options.keys() & {"ffn", "hidden", "layers", "plan"} else {}
    return PruneConfig(
        checkpoint=str(source), data=data, out=out, repair_samples=SAMPLES, batch_size=5, **sizes, **options
    )


def streams(path: Path, data: Path, layers: list[int]) -> list[torch.Tensor]:
    """States that leave some layers, each (tokens, hidden)."""
    model, shape = load_model(path, device=CPU, dtype=torch.float32), Checkpoint(path).shape
    split = TokenDataset(data).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, SAMPLES, len(split))))
    (tap,) = shape.family.taps["block"]
    found: dict[int, torch.Tensor] = {}
    for layer in layers:
        model.get_submodule(tap.module.format(layer=layer)).register_forward_hook(
            lambda module, args, output, layer=layer: found.__setitem__(layer, first_tensor(output).flatten(0, -2))
        )
    with torch.no_grad():
        model(ids)
    return [found[layer] for layer in layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_comes_closer_to_the_originals(family: str, tmp_path: Path) -> None:
    """In every layer, for serial and parallel blocks, biases, transposed linears, norms behind sublayers."""
    source, data = make_pair(tmp_path, family)
    run_prune(cut(source, data, tmp_path / "repaired"))
    run_prune(cut(source, data, tmp_path / "plain", repair="off"))
    layers = list(range(Checkpoint(source).shape["layers"]))
    original, plain, repaired = (
        streams(path, data, layers) for path in (source, tmp_path / "plain", tmp_path / "repaired")
    )
    for target, before, after in zip(original, plain, repaired, strict=True):
        scale = target.square().mean(-1, keepdim=True).sqrt()
        assert ((target - after) / scale).square().mean() < 0.97 * ((target - before) / scale).square().mean()
    changed = {
        name
        for name, value in load_file(tmp_path / "repaired" / "model.safetensors").items()
        if not torch.equal(value, load_file(tmp_path / "plain" / "model.safetensors")[name])
    }
    shape = Checkpoint(tmp_path / "repaired").shape
    ends = {end.name for found in projections(shape).values() for end in found}
    prefix = shape.family.prefix if not any(name in ends for name in changed) else ""
    biases = {name.removesuffix(".weight") + ".bias" for name in ends}
    assert changed and {prefix + name for name in changed} <= ends | biases


def test_first_projection_is_ridge_least_squares(tmp_path: Path) -> None:
    """Against a solution of the normal equations on recorded activations, damped as the held-out rows say."""
    source, data = make_pair(tmp_path, "llama", attention_bias=False, mlp_bias=False)
    run_prune(cut(source, data, tmp_path / "out", layers=1, ffn=28))
    run_prune(cut(source, data, tmp_path / "plain", layers=1, ffn=28, repair="off"))
    layer = plan_prune(cut(source, data, tmp_path / "x", layers=1, ffn=28)).layers[0]
    split = TokenDataset(data).split("train")
    ids = torch.from_numpy(split.rows(batch_rows(0, 0, SAMPLES, len(split))))
    name = "self_attn.o_proj"
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for label, path, number in (("old", source, layer), ("new", tmp_path / "plain", 0)):
        model = load_model(path, device=CPU, dtype=torch.float64)
        heard = seen.setdefault(label, {})
        block = model.model.layers[number]
        block.register_forward_pre_hook(lambda m, a, heard=heard: heard.__setitem__("entered", a[0]))
        block.register_forward_hook(lambda m, a, out, heard=heard: heard.__setitem__("left", out))
        end = block.get_submodule(name)
        end.register_forward_hook(lambda m, a, out, heard=heard: heard.update(input=a[0], output=out))
        with torch.no_grad():
            model(ids)
    old, new = ({key: value.double() for key, value in seen[label].items()} for label in ("old", "new"))
    missing = old["entered"] + old["output"] - new["entered"] - new["output"]
    scale = old["left"].square().mean(-1, keepdim=True).sqrt()
    inputs, missing = ((value / scale) for value in (new["input"], missing))
    held = SAMPLES - SAMPLES // 8

    def solved(part: slice, damping: float) -> torch.Tensor:
        x, r = inputs[part].flatten(0, 1), missing[part].flatten(0, 1)
        gram = x.t() @ x
        return torch.linalg.solve(gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double(), x.t() @ r)

    def held_out(damping: float) -> float:
        x, r = inputs[held:].flatten(0, 1), missing[held:].flatten(0, 1)
        return float((x @ solved(slice(0, held), damping) - r).square().sum())

    expected = solved(slice(0, SAMPLES), min(DAMPING, key=held_out)).t()
    tensors = [load_file(tmp_path / where / "model.safetensors") for where in ("out", "plain")]
    found = tensors[0][f"model.layers.0.{name}.weight"] - tensors[1][f"model.layers.0.{name}.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_repaired_with_nothing_removed_is_the_identity(family: str, tmp_path: Path) -> None:
    """The plan leaves it out; the pass itself, run all the same, finds nothing to correct."""
    source, data = make_pair(tmp_path, family)
    layers = Checkpoint(source).shape["layers"]
    config = cut(source, data, tmp_path / "same", layers=layers)
    plan = plan_prune(config)
    assert plan.repair is None
    run_prune(config)
    before = load_file(source / "model.safetensors")
    assert all(
        torch.equal(value, before[name]) for name, value in load_file(tmp_path / "same/model.safetensors").items()
    )
    pair = [StreamedModel(Checkpoint(path), device=CPU, dtype=torch.float32) for path in (source, tmp_path / "same")]
    split = TokenDataset(data).split("train")
    rows = batch_rows(0, 0, SAMPLES, len(split))
    assert set(Repair(*pair, plan, split, rows, 5, tmp_path, CPU).run().values()) == {None}
    assert all(
        torch.equal(value, before[name]) for name, value in load_file(tmp_path / "same/model.safetensors").items()
    )


@pytest.mark.parametrize("options", [{"hidden": 36}, {"layers": 3}, {"hidden": 36, "rotate": "on"}], ids=str)
def test_other_cuts_are_repaired_too(options: dict[str, Any], tmp_path: Path) -> None:
    """Hidden channels, directions and layers: what the original's stream has in the channels that stay."""
    source, data = make_pair(tmp_path, "llama")
    scored = ImportanceConfig(
        checkpoint=str(source), data=data, out=tmp_path / "i", samples=8, loss_samples=0, collect=("directions",)
    )
    run_importance(scored)
    for how in ("auto", "off"):
        run_prune(cut(source, data, tmp_path / how, importance=tmp_path / "i", repair=how, **options))
    plan = plan_prune(cut(source, data, tmp_path / "x", importance=tmp_path / "i", **options))
    (original,) = streams(source, data, [3])
    if plan.rotate:
        basis = load_file(tmp_path / "i" / "statistics.safetensors")["directions.basis"]
        target = original @ basis[:, :36]
    else:
        target = original[:, plan.keep.get("hidden", list(range(48)))]
    last = len(plan.layers) - 1
    errors = [float((streams(tmp_path / how, data, [last])[0] - target).square().mean()) for how in ("auto", "off")]
    assert errors[0] < 0.97 * errors[1]


def test_states_on_disk_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit; and the working files are gone."""
    source, data = make_pair(tmp_path, "llama")
    run_prune(cut(source, data, tmp_path / "held"))
    monkeypatch.setattr(repairing, "available_bytes", lambda device: 0)
    run_prune(cut(source, data, tmp_path / "spilled"))
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("held", "spilled"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {file.name for file in (tmp_path / "held").iterdir()} == {
        file.name for file in (tmp_path / "spilled").iterdir()
    }


def test_one_layer_at_a_time_is_the_whole_model(tmp_path: Path) -> None:
    """What the pass believes to leave the last layer is what the written model computes."""
    source, data = make_pair(tmp_path, "qwen2")
    plan = plan_prune(cut(source, data, tmp_path / "out"))
    run_prune(cut(source, data, tmp_path / "out", repair="off"))
    pair = [StreamedModel(Checkpoint(path), device=CPU, dtype=torch.float32) for path in (source, tmp_path / "out")]
    split = TokenDataset(data).split("train")
    pass_over = Repair(*pair, plan, split, batch_rows(0, 0, SAMPLES, len(split)), 5, tmp_path, CPU)
    pass_over.run()
    found = pass_over.states[pair[1]].read(slice(0, SAMPLES), CPU).flatten(0, -2)
    (expected,) = streams(tmp_path / "out", data, [3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_saved_plan_repairs_alike(tmp_path: Path) -> None:
    source, data = make_pair(tmp_path, "llama")
    config = cut(source, data, tmp_path / "out", seed=3)
    plan = plan_prune(config)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.repair == {"data": str(data.absolute()), "samples": SAMPLES, "batch_size": 5, "seed": 3}
    run_prune(config)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == plan.to_json()
    saved = PruneConfig(checkpoint=str(source), plan=tmp_path / "out" / "plan.json", out=tmp_path / "again")
    run_prune(saved)
    run_prune(replace(saved, repair="off", out=tmp_path / "plain"))
    files = {out: (tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again", "plain")}
    assert files["out"] == files["again"] != files["plain"]
    data.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="data"):
        run_prune(replace(saved, out=tmp_path / "third"))
    run_prune(replace(saved, out=tmp_path / "third", data=tmp_path / "moved"))
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == files["out"]


def test_bf16_weights_are_repaired_as_they_are_stored(tmp_path: Path) -> None:
    source, data = make_pair(tmp_path, "llama", dtype=torch.bfloat16)
    run_prune(cut(source, data, tmp_path / "out"))
    run_prune(cut(source, data, tmp_path / "plain", repair="off"))
    original, plain, repaired = (streams(path, data, [3])[0] for path in (source, tmp_path / "plain", tmp_path / "out"))
    assert (original - repaired).square().mean() < 0.97 * (original - plain).square().mean()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.isfinite(logits(tmp_path / "out", torch.tensor([[3, 4, 5]]))).all()


def test_what_cannot_be_repaired_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = make_pair(tmp_path, "llama")
    with pytest.raises(ConfigError, match="--data"):
        cut(source, None, tmp_path / "out", repair="on")
    with pytest.raises(InputError, match="does not exist"):
        run_prune(cut(source, tmp_path / "nothing", tmp_path / "out"))
    other = make_data(tmp_path / "other", source)
    index = next(file for file in other.iterdir() if file.suffix == ".json")
    index.write_text(index.read_text().replace(TokenDataset(other).tokenizer, "0" * 64))
    with pytest.raises(InputError, match="another tokenizer"):
        run_prune(cut(source, other, tmp_path / "out"))
    monkeypatch.setattr(repairing, "require_memory", _refuse)
    with pytest.raises(ResourceError, match="--repair off"):
        run_prune(cut(source, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _refuse(parts: dict[str, int], device: torch.device, advice: str) -> None:
    assert all(count > 0 for count in parts.values())
    raise ResourceError(f"Too little; {advice}.")


def test_families_without_plain_ends_are_refused() -> None:
    shape = Shape.of(TINY["llama"])
    elsewhere = {**shape.family.taps, "ffn": (Tap("model.layers.{layer}.mlp", "input", "hidden"),)}
    with pytest.raises(FamilyError, match="use --repair off"):
        projections(replace(shape, family=replace(shape.family, taps=elsewhere)))
    for name, config in TINY.items():
        found = projections(Shape.of(config))
        flags = {tuple(end.last for end in ends) for ends in found.values()}
        ends = max(map(len, flags))
        # What routed experts put out comes from no one projection: their layers end in none.
        whole = {tuple(number == count for number in range(1, count + 1)) for count in range(1, ends + 1)}
        assert flags <= whole | {(False,) * count for count in range(ends + 1)}, name
        assert flags & whole or "experts" in Shape.of(config).sizes, name


@pytest.mark.parametrize(
    "family", ["llama", "granite", "phi", "gpt2", "cohere", "falcon-grouped", "bamba", "falcon_h1"]
)
def test_sublayers_are_added_as_declared(family: str, tmp_path: Path) -> None:
    """What a projection puts out moves what leaves the layer by as much, times the declared factor."""
    path = make_model(tmp_path / "model", family)
    shape = Checkpoint(path).shape
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    (tap,) = shape.family.taps["block"]
    left: list[torch.Tensor] = []
    model.get_submodule(tap.module.format(layer=1)).register_forward_hook(
        lambda module, args, output: left.append(first_tensor(output))
    )
    ids = torch.randint(3, 60, (2, 9))
    for end in reversed(projections(shape)[1]):
        module = model.get_submodule(end.module)
        with torch.no_grad():
            left.clear()
            model(ids)
            handle = module.register_forward_hook(lambda module, args, output: output + 0.25)
            model(ids)
            handle.remove()
            # So that what comes before it is not seen through it.
            for parameter in module.parameters():
                parameter.zero_()
        torch.testing.assert_close(left[1] - left[0], torch.full_like(left[0], 0.25 * end.factor))
    assert not shape.family.post_norms


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4", "opt-post_norm", "exaone4", "olmo3", "gemma3_text"])
def test_norms_behind_sublayers_are_declared(family: str, tmp_path: Path) -> None:
    assert Checkpoint(make_model(tmp_path / "model", family)).shape.family.post_norms


def test_damping_follows_held_out_rows() -> None:
    """Noise is damped, structure is not, and what does not generalise is left alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, generator=generator)

    def moments(rows: int, noise: float, sign: float = 1.0) -> Moments:
        found = Moments(6, 3, CPU)
        x = torch.randn(rows, 6, generator=generator)
        found.add(x, sign * x @ weight + noise * torch.randn(rows, 3, generator=generator))
        return found

    exact, low = correction(moments(500, 0.0), moments(100, 0.0))
    torch.testing.assert_close(exact.float(), weight, rtol=1e-3, atol=1e-3)
    _, high = correction(moments(8, 5.0), moments(100, 5.0))
    assert low == min(DAMPING) and (high is None or high > 1e-2)
    nothing, none = correction(moments(500, 0.0), moments(100, 0.0, sign=-1.0))
    assert none is None and not nothing.any()
    empty = Moments(6, 3, CPU)
    assert not empty.solve(1e-3).any()


def test_the_text_part_of_a_multimodal_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Extracted and repaired at once, or one after the other; in place it cannot run."""
    source, extracted = make_wrapped(tmp_path / "model", "llava"), tmp_path / "text"
    make_tokenizer(source)
    data = make_data(tmp_path / "data", source)
    run_prune(PruneConfig(checkpoint=str(source), out=extracted, text_only=True))
    run_prune(cut(extracted, data, tmp_path / "later"))
    options = {"data": data, "repair_samples": SAMPLES, "batch_size": 5, "ffn": 28}
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "at-once", text_only=True, **options))
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("later", "at-once"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(FamilyError, match="--text-only, or --repair off"):
        run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "insisted", repair="on", **options))
    run_prune(PruneConfig(checkpoint=str(source), out=tmp_path / "in-place", **options))
    assert "Without a repair: a repair runs the text model" in capsys.readouterr().err


def test_few_sequences_are_used_once(tmp_path: Path) -> None:
    """More samples than there are sequences: all of them, none both fitted and held out."""
    source, data = make_pair(tmp_path, "llama")
    for samples, out in ((64, "all"), (500, "more")):  # the data hold 64
        run_prune(replace(cut(source, data, tmp_path / out), repair_samples=samples))
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("all", "more"))
    assert all(torch.equal(first[name], second[name]) for name in first)
