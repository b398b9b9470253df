"""Distillation losses on logits: identities, definitions in fp64, limits, written gradients against autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from minitron_cli.config.objective import KINDS, Objective, Term, parse_objective
from minitron_cli.distill.losses import DIVERGENCES, ON_LOGITS, TopK, top_k
from minitron_cli.distill.over import forward_kl_over, gradient_over
from minitron_cli.distill.terms import Targets, gradient_into, loss_values
from minitron_cli.errors import ConfigError, ShapeError

TOKENS, VOCAB = 7, 31
COMPARING = ["kl", "rkl", "jsd:0.5", "jsd:0.1", "skl:0.1", "skl:0", "tv", "mse", "cosine", "topk:4"]
MIXTURES = ["0.9*kl+0.1*ce", "0.5*jsd:0.3 + 2*mse + rkl + topk:3 + ce"]


def logits(vocab: int = VOCAB, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)


NEXT = torch.arange(TOKENS)


def value(spec: str, student: torch.Tensor, teacher: Targets, temperature: float = 1.0) -> torch.Tensor:
    (values,) = loss_values(parse_objective(spec), student, teacher, NEXT, temperature)
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", COMPARING)
def test_zero_at_equality_and_positive_elsewhere(spec: str, dtype: torch.dtype) -> None:
    """Of any type of logits, values are fp32 or better."""
    a, b = logits(dtype=dtype), logits(dtype=dtype, seed=1)
    same = value(spec, a, a.clone(), temperature=2.0)
    assert same.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert same.abs().max() <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert (value(spec, a, b) > 1e-3).all()


@pytest.mark.parametrize("spec", ["kl", "rkl", "jsd:0.3", "skl:0.1", "tv", "topk:4"])
def test_a_constant_added_to_all_logits_changes_nothing(spec: str) -> None:
    a, b = logits(), logits(seed=1)
    assert torch.allclose(value(spec, a + 5.0, b - 3.0), value(spec, a, b))


DEFINITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kl": lambda q, p: (p * (p / q).log()).sum(-1),
    "rkl": lambda q, p: (q * (q / p).log()).sum(-1),
    "jsd:0.3": lambda q, p: (
        0.3 * (p * (p / (0.3 * p + 0.7 * q)).log()).sum(-1) + 0.7 * (q * (q / (0.3 * p + 0.7 * q)).log()).sum(-1)
    ),
    "skl:0.1": lambda q, p: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1),
    "tv": lambda q, p: (p - q).abs().sum(-1) / 2,
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("spec", DEFINITIONS)
def test_definitions(spec: str, temperature: float) -> None:
    """As the papers write them, in probabilities; student first, teacher second; no T^2 in the value."""
    a, b = logits(), logits(seed=1)
    expected = DEFINITIONS[spec]((a / temperature).softmax(-1), (b / temperature).softmax(-1))
    assert torch.allclose(value(spec, a, b, temperature), expected, rtol=1e-10)


def test_definitions_on_logits() -> None:
    """Mean squares, cosine and cross-entropy agree with torch's own, at any temperature."""
    a, b = logits(), logits(seed=1)
    assert torch.allclose(value("mse", a, b, 3.0), F.mse_loss(a, b, reduction="none").mean(-1))
    assert torch.allclose(value("cosine", a, b, 3.0), 1 - F.cosine_similarity(a, b))
    assert torch.allclose(value("ce", a, b, 3.0), F.cross_entropy(a, NEXT, reduction="none"))


def test_limits() -> None:
    """Generalised JSD: over beta, forward KL as beta -> 0; over 1 - beta, reverse KL as beta -> 1. Skew 0 is KL."""
    a, b = logits(), logits(seed=1)
    small = 1e-7
    assert torch.allclose(value(f"jsd:{small}", a, b) / small, value("kl", a, b), rtol=1e-3)
    assert torch.allclose(value(f"jsd:{1 - small}", a, b) / small, value("rkl", a, b), rtol=1e-3)
    assert torch.equal(value("skl:0", a, b), value("kl", a, b))
    assert torch.allclose(value("jsd:0.5", a, b), value("jsd:0.5", b, a))
    assert (value("jsd:0.5", a, b) < math.log(2)).all()


@pytest.mark.parametrize("spec", ["kl", "rkl", "jsd:0.5", "skl:0.1", "tv", "topk:3", "cosine", "mse"])
def test_far_apart_and_still_finite(spec: str) -> None:
    """Probabilities that underflow in fp32 give a large value, not a NaN, and finite gradients."""
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[:, 3], b[:, 4] = 500.0, 500.0
    out = torch.empty_like(a)
    values = gradient_into(out, parse_objective(spec), a, b, None)
    assert values.isfinite().all() and (values > 0.5).all() and out.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("padding", [(0, 0), (4, 0), (0, 4)])
@pytest.mark.parametrize("spec", [*COMPARING, "ce", *MIXTURES])
def test_written_gradients(spec: str, padding: tuple[int, int], temperature: float) -> None:
    """Against autograd through the values, in fp64; T^2 on softened terms alone; padded vocabularies; in place."""
    student, teacher = logits(VOCAB + padding[0]), logits(VOCAB + padding[1], seed=1)
    objective = parse_objective(spec)
    leaf = student.clone().requires_grad_()
    values = loss_values(objective, leaf, teacher, NEXT, temperature)
    softened = [term.name not in ("ce", "mse", "cosine") for term in objective.terms]
    factors = [
        term.weight * (temperature**2 if soft else 1.0) for term, soft in zip(objective.terms, softened, strict=True)
    ]
    (values.sum(-1) * torch.tensor(factors, dtype=torch.float64)).sum().mul(0.01).backward()
    kept = teacher.clone()
    found = gradient_into(student, objective, student, teacher, NEXT, temperature, scale=0.01)  # over its own logits
    assert torch.allclose(found, values.detach(), rtol=1e-12)
    assert torch.allclose(student, leaf.grad, rtol=1e-9, atol=1e-14)
    assert torch.equal(teacher, kept)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("padding", [(0, 0), (4, 0), (0, 4)])
def test_forward_kl_written_over_both_logits(padding: tuple[int, int], temperature: float) -> None:
    """The fast way through the default loss is the general one; rows of a wider buffer serve too."""
    student, teacher = logits(VOCAB + padding[0]), logits(VOCAB + padding[1], seed=1)
    expected = torch.empty_like(student)
    (values,) = gradient_into(expected, parse_objective("kl"), student, teacher, None, temperature, scale=0.01)
    found = forward_kl_over(student, teacher, temperature, scale=0.01)
    assert torch.allclose(found, values, rtol=1e-12)
    assert torch.allclose(student, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("spec", ["topk:4", "2*topk:1", "topk:30", "ce", "0.5*ce"])
def test_few_words_written_over_the_logits(spec: str, padding: int, temperature: float) -> None:
    """The fast way through a cached teacher's loss and cross-entropy is the general one."""
    student = logits(VOCAB + padding)
    teacher = top_k((logits(seed=1) / temperature).log_softmax(-1), 30)
    objective, expected = parse_objective(spec), torch.empty_like(student)
    given = None if objective.terms[0].name == "ce" else teacher
    values = gradient_into(expected, objective, student, given, NEXT, temperature, scale=0.01)
    found = gradient_over(student, objective, given, NEXT, temperature, scale=0.01)
    assert torch.allclose(found, values, rtol=1e-12)
    assert torch.allclose(student, expected, rtol=1e-9, atol=1e-14)


def test_few_words_written_over_the_logits_keep_their_digits() -> None:
    """In fp32: a student sure of a word, one sure of another, a teacher without a tail; nothing at equality."""

    def certain(dtype: torch.dtype) -> TopK:
        ids, log_probs = torch.tensor([[3, 5]] * TOKENS), torch.tensor([[0.0, -50.0]] * TOKENS, dtype=dtype)
        return TopK(ids, log_probs, torch.full((TOKENS,), -math.inf, dtype=dtype), VOCAB)

    objective = parse_objective("topk:2")
    for sure_of in (3, 4):
        a = torch.zeros(TOKENS, VOCAB)
        a[:, sure_of] = 500.0
        exact = a.double()
        expected = gradient_into(exact, objective, exact, certain(torch.float64), None)
        found = gradient_over(a, objective, certain(torch.float32), None)
        assert torch.allclose(found.double(), expected, atol=1e-4) and a.isfinite().all()
        assert torch.allclose(a.double(), exact, atol=1e-6)
    a = logits(dtype=torch.float32)
    same = top_k(a.log_softmax(-1), 4)
    assert gradient_over(a, parse_objective("topk:4"), same, None).abs().max() < 1e-6 and a.abs().max() < 1e-6


def test_forward_kl_written_over_both_logits_keeps_its_digits() -> None:
    """In fp32: logits far from zero, probabilities that underflow, and exactly nothing at equality."""
    exact, b = logits(seed=1), logits(seed=2)
    expected = value("kl", exact, b)
    a, b = (exact + 900).float(), (b - 700).float()
    rounded = value("kl", a.double(), b.double())  # what is left of the logits' digits
    assert torch.allclose(forward_kl_over(a, b).double(), rounded, rtol=1e-5)
    assert torch.allclose(rounded, expected, rtol=1e-2)
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[:, 3], b[:, 4] = 500.0, 500.0
    assert torch.allclose(forward_kl_over(a, b), torch.tensor(500.0)) and a.isfinite().all()
    a = logits(dtype=torch.float32)
    assert torch.equal(forward_kl_over(a, a.clone()), torch.zeros(TOKENS)) and a.abs().max() < 1e-7


@pytest.mark.parametrize("spec", [*COMPARING, "ce"])
def test_values_pass_gradcheck(spec: str) -> None:
    """What the written gradients are compared with is itself right; total variation has no derivative where p = q."""
    teacher = logits(9, seed=1)
    student = logits(9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_values(parse_objective(spec), x, teacher, NEXT % 9, 1.5), (student,), atol=1e-6
    )


def test_padded_vocabulary_compares_the_common_prefix() -> None:
    """A head padded with rows that the tokenizer never uses is the same distribution over real tokens."""
    a, b = logits(), logits(seed=1)
    padded = torch.cat([b, torch.full((TOKENS, 5), 9.0)], dim=-1)
    for spec in COMPARING:
        assert torch.allclose(value(spec, a, padded), value(spec, a, b))
        assert torch.allclose(value(spec, padded, a), value(spec, b, a))


def test_top_k_is_a_lower_bound_that_grows_with_k() -> None:
    """Up to forward KL itself, once the tail is one word."""
    a, b = logits(), logits(seed=1)
    values = [value(f"topk:{k}", a, b) for k in (1, 4, 16, VOCAB - 1)]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    full = value("kl", a, b)
    assert (values[1] < full).all() and torch.allclose(values[-1], full)
    assert torch.allclose(value("topk:1000000", a, b), full)


def test_top_k_targets_serve_as_the_logits_do() -> None:
    """Stored targets, also more of them than asked for, at their temperature; a tail of nothing is no NaN."""
    a, b = logits(), logits(seed=1)
    stored = top_k((b / 2.0).log_softmax(-1), 8)
    for k in (3, 8):
        assert torch.allclose(value(f"topk:{k}", a, stored, 2.0), value(f"topk:{k}", a, b, 2.0))
    assert torch.allclose(torch.logaddexp(stored.log_probs.logsumexp(-1), stored.log_tail), torch.zeros(1).double())
    empty = TopK(stored.ids, stored.log_probs.log_softmax(-1), torch.full((TOKENS,), -math.inf), VOCAB)
    assert value("topk:8", a, empty).isfinite().all()


def test_the_tail_of_a_sure_teacher_keeps_its_digits() -> None:
    """1 - sum of probabilities would be 0 in fp32."""
    b = torch.zeros(1, 1000)
    b[0, 5] = 40.0
    assert float(top_k(b.log_softmax(-1), 1).log_tail) == pytest.approx(math.log(999) - 40.0, rel=1e-5)


def test_top_k_targets_that_do_not_fit_are_refused() -> None:
    stored = top_k(logits(seed=1).log_softmax(-1), 8)
    with pytest.raises(ShapeError, match="topk:9 needs 9 words"):
        value("topk:9", logits(), stored)
    with pytest.raises(ShapeError, match="cache the first 20"):
        value("topk:4", logits(20), stored)


def test_every_kind_has_a_formula() -> None:
    assert KINDS.keys() == {*DIVERGENCES, *ON_LOGITS, "topk", "ce"}


def test_objectives_are_read() -> None:
    read = parse_objective(" 0.9*kl + 1e-1 * ce+1e+2*jsd:0.25")
    assert read == Objective((Term("kl", 0.0, 0.9), Term("ce", 0.0, 0.1), Term("jsd", 0.25, 100.0)))
    assert list(map(str, read.terms)) == ["kl", "ce", "jsd:0.25"]
    assert read.needs_teacher and not read.takes_top_k
    assert not parse_objective("ce").needs_teacher
    assert parse_objective("topk:24+0.5*ce").takes_top_k


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("klx", "did you mean 'kl'"),
        ("", "known losses"),
        ("kl+", "known losses"),
        ("kl+kl", "kl twice"),
        ("jsd", "for example jsd:0.5"),
        ("jsd:0", "between 0 and 1"),
        ("jsd:1", "between 0 and 1"),
        ("skl:1", "0 to below 1"),
        ("skl:nan", "0 to below 1"),
        ("topk:0", "whole number"),
        ("topk:2.5", "whole number"),
        ("topk:inf", "whole number"),
        ("kl:1", "takes no parameter"),
        ("kl:", "takes no parameter"),
        ("0*kl", "not a positive number"),
        ("-1*kl", "not a positive number"),
        ("*kl", "not a positive number"),
        ("inf*kl", "not a positive number"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_objective(spec)
    assert "\n" not in str(caught.value)
