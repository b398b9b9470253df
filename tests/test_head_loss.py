"""The fused head and loss: every family's stock head, in chunks, against autograd through whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_cli.config.objective import parse_objective
from minitron_cli.distill import fused
from minitron_cli.distill.fused import HeadLoss, Lesson, head_loss, logits_bytes
from minitron_cli.distill.losses import top_k
from minitron_cli.distill.terms import loss_values
from minitron_cli.errors import FamilyError
from minitron_cli.models import chunks
from minitron_cli.models.chunks import Sizes, parts
from minitron_cli.models.head import Head, Projection, backbone_output

IDS = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(1))
NEXT = IDS.flatten()


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model of a family in memory."""
    values = {**TINY, **{k: {"model_type": k.split("-")[0], **v} for k, v in VARIANTS.items()}}[family] | changes
    # The product that runs experts by default knows no fp64.
    values |= {"experts_implementation": "eager"}
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


def lesson_of(teacher: Any) -> tuple[Lesson, torch.Tensor]:
    """The teacher's final hidden states with its head, and its whole logits."""
    with torch.no_grad():
        output = backbone_output(teacher, IDS)
        return Lesson(output.last_hidden_state.flatten(0, 1), Head(teacher, output)), teacher(IDS).logits.flatten(0, 1)


@pytest.fixture(scope="module")
def taught() -> tuple[Lesson, torch.Tensor]:
    """Of a teacher with a vocabulary padded by three words and a width of its own."""
    return lesson_of(tiny("llama", seed=5, vocab_size=70))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens a chunk, two a block, of 70 words."""
    monkeypatch.setattr(fused, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(chunks, "CPU", Sizes(4 * 70 * 5, 4 * 70 * 2))


def whole(model: Any, spec: str, logits: Any, temperature: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of terms, and gradients of the mean, by autograd through the stock model's logits."""
    objective = parse_objective(spec)
    model.zero_grad()
    sums = loss_values(objective, model(IDS).logits.flatten(0, 1), logits, NEXT, temperature).sum(-1)
    softened = [1 if term.name in ("ce", "mse", "cosine") else temperature**2 for term in objective.terms]
    weights = [term.weight * factor for term, factor in zip(objective.terms, softened, strict=True)]
    ((sums * torch.tensor(weights, dtype=sums.dtype)).sum() / len(NEXT)).backward()
    return sums.detach(), gradients(model)


def chunked(model: Any, spec: str, teacher: Any, temperature: float = 1.0) -> tuple[HeadLoss, dict[str, torch.Tensor]]:
    """The same by `head_loss`."""
    model.zero_grad()
    output = backbone_output(model, IDS)
    hidden = output.last_hidden_state.flatten(0, 1)
    result = head_loss(
        hidden, Head(model, output), parse_objective(spec), teacher=teacher, next_tokens=NEXT,
        temperature=temperature, scale=1 / len(NEXT),
    )  # fmt: skip
    hidden.backward(result.gradient)
    return result, gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **{"rtol": 1e-9, "atol": 1e-12, **tolerance}, msg=name)


HEADS = [*TINY, *(name for name in VARIANTS if "tied" in name)]


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.usefixtures("small")
def test_every_stock_head(family: str, taught: tuple[Lesson, torch.Tensor]) -> None:
    """Soft-caps, scales, divisors, biases, ties: the gradient written over the logits goes through all of them."""
    model = tiny(family)
    sums, expected = whole(model, "0.5*kl+0.25*ce", taught[1], temperature=1.5)
    result, found = chunked(model, "0.5*kl+0.25*ce", taught[0], temperature=1.5)
    assert list(result.terms.values()) == pytest.approx(sums.tolist(), rel=1e-9)
    assert result.total == pytest.approx(0.5 * float(sums[0]) + 0.25 * float(sums[1]), rel=1e-9)
    # NemotronHForCausalLM: self.lm_head(hidden_states).float()
    same(found, expected, **({"rtol": 1e-4, "atol": 1e-6} if family.startswith("nemotron_h") else {}))


@pytest.mark.parametrize("spec", ["rkl", "jsd:0.3", "skl:0.1", "tv", "mse", "cosine", "topk:4", "ce", "kl+0.1*mse+ce"])
@pytest.mark.usefixtures("small")
def test_every_loss(spec: str, taught: tuple[Lesson, torch.Tensor]) -> None:
    """Chunked equals whole, through a capped and tied head."""
    model = tiny("gemma2")
    sums, expected = whole(model, spec, taught[1])
    result, found = chunked(model, spec, taught[0])
    assert list(result.terms) == [str(term) for term in parse_objective(spec).terms]
    assert list(result.terms.values()) == pytest.approx(sums.tolist(), rel=1e-9)
    same(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("vocab", [67, 70, 75])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_blocks_of_words(
    family: str, vocab: int, temperature: float, taught: tuple[Lesson, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where even a few tokens' logits are too many: normalisers found online, either vocabulary the longer one."""
    monkeypatch.setattr(chunks, "CPU", Sizes(4 * 75 * 10, 4 * 75))
    model = tiny(family, vocab_size=vocab)
    for spec in ("0.5*kl+0.25*ce", "kl"):
        sums, expected = whole(model, spec, taught[1], temperature)
        with monkeypatch.context() as context:
            context.setattr(Head, "buffer", spying(Head.buffer, widths := []))
            result, found = chunked(model, spec, taught[0], temperature)
        assert widths and max(widths) < 16
        assert list(result.terms.values()) == pytest.approx(sums.tolist(), rel=1e-9)
        same(found, expected)


def spying(real: Any, widths: list[int]) -> Any:
    """`Head.buffer`, with the words asked for noted."""

    def buffer(self: Head, tokens: int, words: int | None = None) -> torch.Tensor:
        widths.append(words or self.vocab)
        return real(self, tokens, words)

    return buffer


@pytest.mark.usefixtures("small")
def test_stored_top_k_targets(taught: tuple[Lesson, torch.Tensor]) -> None:
    """A teacher that is not there any more teaches what the live one does."""
    model = tiny("granite")
    stored = top_k(taught[1][:, :67].log_softmax(-1), 6)
    live, expected = chunked(model, "topk:5+ce", taught[0])
    cached, found = chunked(model, "topk:5+ce", stored)
    assert cached.terms == pytest.approx(live.terms, rel=1e-9)
    same(found, expected)


@pytest.mark.usefixtures("small")
def test_gradients_add_up_over_calls(taught: tuple[Lesson, torch.Tensor]) -> None:
    """A second micro-batch adds to the first one's gradients, in the same memory."""
    model = tiny("phi")  # its head has a bias
    _, once = chunked(model, "kl", taught[0])
    output = backbone_output(model, IDS)
    held = model.lm_head.weight.grad
    result = head_loss(
        output.last_hidden_state.flatten(0, 1), Head(model, output), parse_objective("kl"), teacher=taught[0],
        scale=1 / len(NEXT),
    )  # fmt: skip
    output.last_hidden_state.flatten(0, 1).backward(result.gradient)
    assert model.lm_head.weight.grad is held
    same(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


@pytest.mark.usefixtures("small")
def test_the_gradient_goes_back_in_the_memory_of_the_logits(
    taught: tuple[Lesson, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd would copy it, vocabulary x tokens, through a view that was written to."""
    made, sent, plain = [], [], (Projection.product, Projection.accumulate)

    def product(self: Projection, states: torch.Tensor, words: slice, out: torch.Tensor) -> None:
        made.append(out.data_ptr())
        plain[0](self, states, words, out)

    def accumulate(self: Projection, gradient: torch.Tensor, states: torch.Tensor, words: slice) -> None:
        sent.append(gradient.data_ptr())
        plain[1](self, gradient, states, words)

    monkeypatch.setattr(Projection, "product", product)
    monkeypatch.setattr(Projection, "accumulate", accumulate)
    chunked(tiny("llama"), "kl", taught[0])
    assert len(sent) > 1 and set(sent) == {made[0]}


@pytest.mark.usefixtures("small")
def test_a_frozen_head_gets_no_gradient(taught: tuple[Lesson, torch.Tensor]) -> None:
    """The body learns as it does under a head that learns too."""
    model = tiny("llama")
    _, expected = chunked(model, "kl", taught[0])
    model.zero_grad()
    model.lm_head.requires_grad_(False)
    _, found = chunked(model, "kl", taught[0])
    del expected["lm_head.weight"]
    same(found, expected)


@pytest.mark.usefixtures("small")
def test_bfloat16_compute_keeps_wide_sums() -> None:
    """Under autocast the products round and nothing else does: logits, losses and the weight's gradient are fp32."""
    model = tiny("gemma2", dtype=torch.float32)
    lesson, _ = lesson_of(tiny("llama", seed=5, vocab_size=70, dtype=torch.bfloat16))
    found = {}
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            output = backbone_output(model, IDS)
            head, hidden = Head(model, output), output.last_hidden_state.flatten(0, 1)
            made = head.into(head.buffer(len(NEXT)), hidden)
            stock = model(IDS).logits.flatten(0, 1)
            model.zero_grad()
            result = head_loss(hidden, head, parse_objective("kl"), teacher=lesson, scale=1 / len(NEXT))
        found[rounded] = result, model.lm_head.weight.grad
    assert made.dtype == torch.float32 and stock.dtype == torch.bfloat16
    torch.testing.assert_close(made, stock.float(), rtol=2e-2, atol=2e-2)
    assert not torch.equal(made, made.bfloat16().float())  # capped after the upcast
    (exact, expected), (result, weight) = found[False], found[True]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    assert result.total == pytest.approx(exact.total, rel=0.05)
    for one, other in ((result.gradient, exact.gradient), (weight, expected)):
        assert torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten(), dim=0) > 0.999


def test_no_tokens() -> None:
    """A batch in which nothing is a target adds nothing."""
    model = tiny("llama")
    output = backbone_output(model, IDS)
    result = head_loss(
        output.last_hidden_state[0, :0], Head(model, output), parse_objective("ce"), next_tokens=NEXT[:0]
    )
    assert result.total == 0.0 and result.gradient.shape == (0, 48) and not gradients(model)


def test_another_kind_of_head_is_refused() -> None:
    """A head that is no linear layer has no gradient here; better a sentence than a wrong one."""

    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny("llama")
    model.lm_head = Scaled(48, 67, dtype=torch.float64)
    with pytest.raises(FamilyError, match="Scaled"):
        chunked(model, "ce", None)


@pytest.mark.parametrize(("tokens", "most"), [(10, 3), (9, 3), (1, 5), (0, 4), (1024, 220)])
def test_parts_cover_all_tokens_evenly(tokens: int, most: int) -> None:
    ranges = list(parts(tokens, most))
    assert [token for part in ranges for token in range(part.start, part.stop)] == list(range(tokens))
    lengths = [part.stop - part.start for part in ranges]
    assert not lengths or (max(lengths) <= most and max(lengths) - min(lengths) <= 1)


def test_memory_estimate_is_bounded() -> None:
    """Whatever the vocabulary and the batch, up to the one token that a chunk must hold."""
    device = torch.device("cpu")
    assert logits_bytes(1 << 20, 151_936, device) < 1.3e9
    assert logits_bytes(16, 2048, device) < 3e6
