"""Distillation losses: identities, gradients against autograd, chunked == whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_model
from torch.nn import functional as F

from minitron_cli.distill import chunked
from minitron_cli.distill.chunked import backward_in_chunks, ce_loss, kl_loss
from minitron_cli.distill.losses import cross_entropy, forward_kl
from minitron_cli.models.head import Head, backbone_output
from minitron_cli.models.load import load_model

GENERATOR = torch.Generator().manual_seed(1)


def random_logits(tokens: int = 7, vocab: int = 31) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=GENERATOR) * 3


def test_forward_kl_is_a_divergence() -> None:
    """Zero at equality (also up to a constant), positive elsewhere, and equal to its definition in fp64."""
    a, b = random_logits(), random_logits()
    assert forward_kl(a, a).abs().max() < 1e-6
    assert forward_kl(a, a + 5.0).abs().max() < 1e-5
    assert (forward_kl(a, b) > 0.01).all()
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    assert torch.allclose(forward_kl(a, b).double(), (p * (p / q).log()).sum(-1), rtol=1e-5)


def test_forward_kl_is_not_symmetric() -> None:
    """Student first, teacher second: swapping them is another number."""
    a, b = random_logits(), random_logits()
    assert not torch.allclose(forward_kl(a, b), forward_kl(b, a), rtol=0.05)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_kl_gradient(temperature: float) -> None:
    """d KL / d student logits = (q - p) / T."""
    student, teacher = random_logits().requires_grad_(), random_logits()
    forward_kl(student, teacher, temperature).sum().backward()
    expected = ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / temperature
    assert torch.allclose(student.grad, expected.detach(), atol=1e-6)


def test_padded_vocabulary_compares_the_common_prefix() -> None:
    """A head padded with rows that the tokenizer never uses is the same distribution over real tokens."""
    a, b = random_logits(), random_logits()
    padded = torch.cat([b, torch.full((7, 5), 9.0)], dim=-1)
    assert torch.allclose(forward_kl(a, padded), forward_kl(a, b), atol=1e-6)


def test_cross_entropy_matches_torch() -> None:
    a, targets = random_logits(), torch.arange(7)
    assert torch.allclose(cross_entropy(a, targets), F.cross_entropy(a, targets, reduction="none"))


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_chunked_equals_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every parameter's gradient: a few tokens at a time or all at once, through a real model."""
    path = make_model(tmp_path / "student", tie_word_embeddings=True)
    teacher = load_model(make_model(tmp_path / "teacher", seed=5), device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.randint(0, 67, (2, 12), generator=GENERATOR)
    with torch.no_grad():
        lesson = backbone_output(teacher, ids)
        whole_teacher = teacher(ids).logits[:, :-1].flatten(0, 1)
    results = []
    for whole in (False, True):
        model = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        if whole:
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            losses = forward_kl(logits, whole_teacher) if kind == "kl" else cross_entropy(logits, ids[:, 1:].flatten())
            losses.mean().backward()
            total = float(losses.detach().sum())
        else:
            monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 67 * 5)  # five tokens a chunk
            output = backbone_output(model, ids)
            hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
            states = lesson.last_hidden_state[:, :-1].flatten(0, 1)
            loss = kl_loss(states, Head(teacher, lesson), 1.0) if kind == "kl" else ce_loss(ids[:, 1:].flatten())
            total = backward_in_chunks(hidden, Head(model, output), loss, 1 / len(hidden))
        results.append((total, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (chunk_total, chunk_grads), (whole_total, whole_grads) = results
    assert chunk_total == pytest.approx(whole_total, rel=1e-5)
    for name, gradient in whole_grads.items():
        assert torch.allclose(chunk_grads[name], gradient, rtol=1e-4, atol=1e-6), name
