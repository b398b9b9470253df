"""Intermediate states: gradients against plain autograd in fp64, places against the stock model's own states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_chain import make_checkpoint, make_data
from safetensors.torch import load_file
from tiny import TINY
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_cli.config.distill import DistillConfig
from minitron_cli.config.intermediate import layer_pairs, parse_layers_map
from minitron_cli.distill import intermediate
from minitron_cli.distill.intermediate import Matching, orthonormal
from minitron_cli.distill.stage import run_distill
from minitron_cli.distill.state_losses import relation_kl, relative_squares
from minitron_cli.distill.trainer import Batch, Teacher, Trainer, Update
from minitron_cli.errors import ConfigError, FamilyError
from minitron_cli.models import chunks
from minitron_cli.models.chunks import Sizes
from minitron_cli.models.states import HEADS, Listener, Place, tap_at
from minitron_cli.runtime.state import load_state
from minitron_cli.shape import Shape

STATES = ("embeddings", "blocks", "mlp_inputs", "attention")
NARROW: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "gemma2": {"hidden_size": 36, "num_hidden_layers": 3},
    "phi3": {"hidden_size": 36, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3},
    "gpt_neox": {"hidden_size": 72, "num_attention_heads": 3, "num_hidden_layers": 3},
    "opt": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
    "falcon-grouped": {"hidden_size": 96, "num_hidden_layers": 3},
}
"""What makes a student of each family: fewer layers, and (but for the last) less hidden."""


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a family in memory."""
    values = {**TINY[family], "experts_implementation": "eager", **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


def shape_of(model: Any) -> Shape:
    return Shape.of(model.config.to_dict())


def settings(**changes: Any) -> DistillConfig:
    values = {"steps": 1, "lr": 1e-9, "clip": 1e9, "batch_size": 3, "layers_map": "last-1:last-1", **changes}
    return DistillConfig(student="s", teacher="t", data=Path("d"), out=Path("o"), **values)


def batches(parts: Sequence[int] = (3,)) -> list[Batch]:
    """Three sequences, the second with masked targets, as micro-batches of these sizes."""
    ids = torch.randint(3, 67, (3, 12), generator=torch.Generator().manual_seed(1))
    targets = torch.ones(3, 11, dtype=torch.bool)
    targets[1, :4] = targets[1, 9:] = targets[2, 3] = False
    cuts = [sum(parts[:number]) for number in range(len(parts) + 1)]
    return [Batch(ids[a:b], targets[a:b]) for a, b in itertools.pairwise(cuts)]


def one_step(config: DistillConfig, teacher: Any, student: Any, given: list[Batch]) -> tuple[Trainer, Update]:
    """A step so small that it changes nothing; gradients stay where they are."""
    matching = Matching.of(config, shape_of(teacher), shape_of(student))
    teaching = Teacher(teacher, matching.teacher_listener(teacher))
    trainer = Trainer(student, config, 1, torch.float32, matching.loss(student))
    return trainer, trainer.update(given, (teaching.lesson(batch) for batch in given), 0)


# --- the reference: the stock model's own states, and whole-batch autograd --------------------------------------------


def plain_states(model: Any, batch: Batch, layer: int) -> tuple[dict[str, Tensor], Tensor]:
    """States at target positions by the stock model's `output_hidden_states` and module names, and its logits."""
    found: dict[str, Tensor] = {}

    def keep(name: str, side: int) -> Any:
        return lambda module, args, output: found.__setitem__(name, (args[0], output)[side])

    handles = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if str(layer) not in parts or "head" in name:
            continue
        if parts[-1] == "mlp" or parts[-1] == "fc1":
            handles.append(module.register_forward_hook(keep("mlp_inputs", 0)))
        for stream, letter in zip(HEADS, "qkv", strict=True):
            if parts[-1] == f"{letter}_proj":
                handles.append(module.register_forward_hook(keep(stream, 1)))
        if parts[-1] in ("c_attn", "query_key_value", "qkv_proj"):
            handles.append(module.register_forward_hook(keep("fused", 1)))
    output = model(batch.ids, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    if "fused" in found:
        found |= dict(zip(HEADS, stock_split(model, found.pop("fused")), strict=True))
    found["embeddings"], found["blocks"] = output.hidden_states[0], output.hidden_states[layer + 1]
    logits = output.logits[:, :-1][batch.targets]
    shape = (*batch.ids.shape, -1)
    return {name: state.reshape(*shape)[:, :-1][batch.targets] for name, state in found.items()}, logits


def stock_split(model: Any, fused: Tensor) -> Sequence[Tensor]:
    """As the attention modules of the stock classes take the fused product apart."""
    config, (batch, seq, width) = model.config, fused.shape
    match config.model_type:
        case "gpt2":
            return fused.split(config.n_embd, dim=2)
        case "phi3":
            wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            return fused.split([wide, narrow, narrow], dim=2)
        case "gpt_neox":
            return fused.view(batch, seq, config.num_attention_heads, -1).chunk(3, dim=-1)
        case _:
            query, key, value = model.transformer.h[0].self_attention._split_heads(fused)
            # The stock class hands out each key and value head as often as queries share it.
            heads = config.num_kv_heads if config.new_decoder_architecture else 1
            each = config.num_attention_heads // heads if config.new_decoder_architecture else 1
            return query, key.reshape(batch, seq, -1, width and key.shape[-1])[:, :, ::each], value[:, :, ::each]


def plain_relations(states: Tensor, heads: int) -> Tensor:
    split = states.reshape(len(states), heads, -1)
    return torch.stack([(split[:, h] @ split[:, h].T / split.shape[-1] ** 0.5).softmax(-1) for h in range(heads)])


def plain_component(name: str, measure: str, s: Tensor, t: Tensor, heads: int, lengths: list[int]) -> Tensor:
    """The sum over tokens, straight from the definition."""
    if name in HEADS:
        total = s.new_zeros(())
        for mine, theirs in zip(s.split(lengths), t.split(lengths), strict=True):
            p, q = plain_relations(theirs, heads), plain_relations(mine, heads)
            total = total + (p * (p / q).log()).sum() / heads / len(HEADS)
        return total
    if measure == "cosine":
        return (1 - F.cosine_similarity(s, t, dim=-1)).sum()
    return ((s - t).square().sum(-1) / t.square().sum(-1)).sum()


def reference(config: DistillConfig, teacher: Any, student: Any, projection: Tensor | None) -> dict[str, float]:
    """Gradients of L_logits + alpha L_is of the whole batch, left in `.grad`; returns the mean components."""
    (batch,) = batches()
    count = int(batch.targets.sum())
    pairs = layer_pairs(config.layers_map, shape_of(teacher)["layers"], shape_of(student)["layers"])
    terms: dict[str, Tensor] = {}
    for theirs, mine in pairs:
        with torch.no_grad():
            said, target = plain_states(teacher, batch, theirs)
        found, logits = plain_states(student, batch, mine)
        for name in ("embeddings", "blocks", "mlp_inputs", *HEADS):
            kind = "attention" if name in HEADS else name
            axis = "heads" if name == "query" else "kv_heads"
            heads = math.gcd(shape_of(teacher)[axis], shape_of(student)[axis])
            lifted = found[name] if projection is None or name in HEADS else found[name] @ projection.T
            both = ("cosine", "mse") if config.state_loss == "both" else (config.state_loss,)
            for measure in ("",) if name in HEADS else both:
                value = plain_component(name, measure, lifted, said[name], heads, batch.lengths) / len(pairs)
                label = f"{kind} {measure}" if len(both) > 1 and measure else kind
                terms[label] = terms.get(label, value.new_zeros(())) + value
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    terms["kl"] = (log_p.exp() * (log_p - log_q)).sum()
    states = sum(value for name, value in terms.items() if name != "kl")
    assert isinstance(states, Tensor)
    alpha = config.alpha or (terms["kl"] / states).detach()
    ((terms["kl"] + alpha * states) / count).backward()
    return {"alpha": float(alpha), **{name: float(value.detach()) / count for name, value in terms.items()}}


@pytest.mark.parametrize("family", NARROW)
@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ((3,), {"layers_map": "last-1:last-1,0:1"}),
        ((1, 2), {"state_loss": "both"}),
        ((2, 1), {"state_loss": "mse", "alpha": 0.7}),
    ],
)
def test_a_step_is_that_of_the_plain_definition(family: str, parts: tuple[int, ...], changes: dict[str, Any]) -> None:
    """All states at once, in one micro-batch and in several, dynamic alpha and constant: values and gradients."""
    config = settings(states=STATES, **changes)
    teacher, student, twin = tiny(family, 1), tiny(family, 2, **NARROW[family]), tiny(family, 2, **NARROW[family])
    trainer, update = one_step(config, teacher, student, batches(parts))
    projection = None
    if trainer.states.projection is not None:
        projection = orthonormal(*trainer.states.projection.shape, seed=0).double().requires_grad_()
    assert (projection is None) == (family == "falcon-grouped")
    expected = reference(config, teacher, twin, projection)
    assert update.terms == pytest.approx(expected, rel=1e-9)
    assert update.loss == pytest.approx(expected["kl"], rel=1e-9)
    # Norms and softmaxes of some stock classes compute in fp32, whatever the model's type.
    for (name, mine), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 2e-6 * theirs.grad.abs().max() + 1e-12, name
    if projection is not None:
        torch.testing.assert_close(trainer.states.projection.grad, projection.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(alpha: float | None) -> None:
    config = settings(states=STATES, state_loss="both", alpha=alpha, layers_map="0:0,2:2")
    _, update = one_step(config, tiny("llama", 1), student := tiny("llama", 1), batches((2, 1)))
    assert update.terms == pytest.approx({**dict.fromkeys(update.terms, 0.0), "alpha": alpha or 0.0}, abs=1e-12)
    assert all(p.grad is None or p.grad.abs().max() < 1e-10 for p in student.parameters())


def test_parts_of_heads_and_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(states=STATES)
    whole = one_step(config, tiny("llama", 1), tiny("llama", 2), batches())[1]
    monkeypatch.setattr(intermediate, "CHUNK_TOKENS", 2)
    monkeypatch.setattr(chunks, "CPU", Sizes(1, 4 * 67))
    assert one_step(config, tiny("llama", 1), tiny("llama", 2), batches())[1].terms == pytest.approx(whole.terms)


def test_masked_tokens_do_not_matter() -> None:
    """Other ids where nothing is predicted, after the last target: the same values, to the last bit."""
    found = []
    for last in (5, 60):
        (batch,) = batches()
        batch.ids[1, 10:] = last
        found.append(one_step(settings(states=STATES), tiny("gpt2", 1), tiny("gpt2", 2), [batch])[1].terms)
    assert found[0] == found[1]


def test_recomputed_activations_give_the_same_gradients() -> None:
    students = [tiny("llama", 2), tiny("llama", 2)]
    for student, recompute in zip(students, (False, True), strict=True):
        config = settings(states=STATES, checkpoint_activations=recompute)
        one_step(config, tiny("llama", 1), student, batches((2, 1)))
    for mine, theirs in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_half_precision_is_near() -> None:
    """bf16 compute: states are compared in fp32."""
    config = settings(states=STATES)
    matching = Matching.of(config, shape_of(teacher := tiny("llama", 1).bfloat16()), shape_of(tiny("llama", 2)))
    student = tiny("llama", 2).float()
    trainer = Trainer(student, config, 1, torch.bfloat16, matching.loss(student))
    teaching = Teacher(teacher, matching.teacher_listener(teacher))
    update = trainer.update(given := batches(), [teaching.lesson(batch) for batch in given], 0)
    exact = one_step(config, tiny("llama", 1), tiny("llama", 2), batches())[1]
    assert update.terms == pytest.approx(exact.terms, rel=0.1)


# --- the pure functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [relative_squares, lambda s, t: relation_kl(s, t, 3)])
def test_distances(loss: Any) -> None:
    """Zero at equality, never negative, the gradient is autograd's."""
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    value, gradient = loss(leaf := student.requires_grad_(), teacher)
    assert (value > 0).all()
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert loss(teacher, teacher)[0].abs().max() < 1e-14 and loss(teacher, teacher)[1].abs().max() < 1e-14


def test_the_projection_keeps_lengths_and_is_reproducible() -> None:
    first = orthonormal(9, 4, seed=3)
    torch.testing.assert_close(first.T @ first, torch.eye(4))
    assert torch.equal(first, orthonormal(9, 4, seed=3)) and not torch.equal(first, orthonormal(9, 4, seed=4))


# --- places -----------------------------------------------------------------------------------------------------------


def first_place(shape: Shape, stream: str) -> Place | None:
    """Where a stream is in the first layer that has it; None where no layer does (a gate in the same projection)."""
    for layer in range(shape["layers"]):
        try:
            tap_at(shape, Place(stream, layer))
        except FamilyError:
            continue
        return Place(stream, layer)
    return None


@pytest.mark.parametrize("family", TINY)
def test_every_family_says_where_its_states_are(family: str) -> None:
    """Widths as declared, and only the places asked for are listened to."""
    model = tiny(family)
    shape = shape_of(model)
    found = {stream: first_place(shape, stream) for stream in ("mlp_inputs", *HEADS)}
    inside = {stream: place for stream, place in found.items() if place is not None}
    assert "mlp_inputs" in inside
    places = [Place("embeddings", 0), Place("blocks", 2), *inside.values()]
    listener = Listener.at(model, shape, places)
    seen: list[int] = []

    def forward(**options: Any) -> Any:
        seen.append(sum(len(module._forward_hooks) for module in model.modules()))
        with torch.no_grad():
            return model(torch.arange(3, 11).view(2, 4), use_cache=False, **options)

    _, states = listener.run(forward, 2)
    stock = forward(output_hidden_states=True).hidden_states
    assert seen == [len(set(listener.taps.values())), 0] and 3 <= seen[0] <= 6
    torch.testing.assert_close(states[Place("embeddings", 0)], stock[0])
    torch.testing.assert_close(states[Place("blocks", 2)], stock[3])
    for stream, axis in {"query": "heads", "key": "kv_heads", "value": "kv_heads"}.items():
        if stream in inside:
            assert states[inside[stream]].shape == (2, 4, shape[axis] * shape["head_dim"])
    assert states[inside["mlp_inputs"]].shape == (2, 4, shape["hidden"])
    assert Listener().run(lambda: 3, 2) == (3, {})


def test_a_family_without_queries_says_so() -> None:
    config = AutoConfig.for_model("deepseek_v3").to_dict()
    with pytest.raises(FamilyError, match="deepseek_v3 family does not say where layer 5 has its query; leave attent"):
        tap_at(Shape.of(config), Place("query", 5))


# --- options ----------------------------------------------------------------------------------------------------------


def test_layer_maps() -> None:
    assert layer_pairs("last-2:last-2", 32, 16) == ((29, 13),)
    assert layer_pairs("29:13, 31:15", 32, 16) == ((29, 13), (31, 15))
    assert layer_pairs("last:last,0:0", 6, 3) == ((5, 2), (0, 0))
    for spec in ("", "last", "1:2:3", "-1:0", "last+1:0", "1:1,1:1", "a:b"):
        with pytest.raises(ConfigError):
            parse_layers_map(spec)
    for spec, told in (
        ("last-2:last-2", "the student has layers 0 to 1, and no layer last-2."),
        ("6:0", "the teacher has layers 0 to 5, and no layer 6."),
        ("last:0,5:0", "5:0 is layer 5:0, mapped twice."),
    ):
        with pytest.raises(ConfigError, match=told):
            layer_pairs(spec, 6, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"states": ("blocks",), "teacher": None, "loss": "ce"}, "--states needs --teacher"),
        ({"states": ("blocks",), "cache_teacher": Path("c")}, "a cache holds no states"),
        ({"states": ("blocks",), "compile": True}, "--compile"),
        ({"states": ("layers",)}, "--states"),
        ({"states": ("blocks",), "layers_map": "3"}, "--layers-map: '3' is not TEACHER:STUDENT"),
        ({"alpha": 2.0}, "add --states blocks"),
        ({"states": ("blocks",), "alpha": 0.0}, "--alpha"),
        ({"state_loss": "l2"}, "--state-loss"),
    ],
)
def test_options_that_cannot_be_meant(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DistillConfig(**{"student": "s", "teacher": "t", "data": "d", "out": "o", "steps": 1} | changes)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("chain")
    teacher = make_checkpoint(root / "teacher")
    student = make_checkpoint(root / "student", hidden_size=36, num_hidden_layers=3)
    return {"student": str(student), "teacher": str(teacher), "data": make_data(root / "data", teacher)}


RUN: dict[str, Any] = {"steps": 8, "batch_size": 4, "micro_batch": 2, "save_every": 2, "states": STATES, "lr": 1e-3}


@pytest.fixture(scope="module")
def undisturbed(chain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_distill(DistillConfig(**chain, out=out, **RUN))
    return out


def test_the_projection_is_saved_and_resumed_to_the_bit(
    chain: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 6, after the checkpoint of step 4: the same bytes; the projection stays out of the model."""
    real, calls = Trainer.update, iter(range(100))

    def failing(*arguments: Any) -> Update:
        if next(calls) == 5:
            raise SystemExit
        return real(*arguments)

    monkeypatch.setattr(Trainer, "update", failing)
    config = DistillConfig(**chain, out=tmp_path / "out", **RUN)
    with pytest.raises(SystemExit):
        run_distill(config)
    saved = max((tmp_path / "out.partial").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    tensors, values = load_state(saved) or ({}, {})
    assert values["step"] == 4 and {"weight.states.projection", "exp_avg.states.projection"} <= tensors.keys()
    assert not torch.equal(tensors["weight.states.projection"], orthonormal(48, 36, seed=0))
    monkeypatch.setattr(Trainer, "update", real)
    run_distill(config)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()
    assert load_file(undisturbed / name).keys() == load_file(Path(chain["student"]) / name).keys()


def test_micro_batches_do_not_change_a_run(chain: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    run_distill(DistillConfig(**chain, out=tmp_path / "out", **{**RUN, "micro_batch": 4}))
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "out", undisturbed))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


def test_states_alone_can_teach(chain: dict[str, Any], tmp_path: Path) -> None:
    """--loss ce with states: the teacher's head is not asked, its states are."""
    result = run_distill(DistillConfig(**chain, out=tmp_path / "out", **{**RUN, "loss": "ce", "steps": 2}))
    assert result.loss_first > 1


def test_a_map_past_the_end_is_refused_before_loading(chain: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the student has layers 0 to 2"):
        run_distill(DistillConfig(**chain, out=tmp_path / "out", **{**RUN, "layers_map": "3:3"}))
    assert not list(tmp_path.iterdir())
