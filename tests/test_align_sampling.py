"""Sampling in batches equals sampling one by one; log-probabilities are those of the stock class; draws are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from tiny import TINY

from minitron_cli.align.sampling import Responses, Sampler, draw, left_padded, log_probs
from minitron_cli.models.load import load_model
from minitron_cli.shape import Shape

STOPS = tuple(range(0, 67, 4))
PROMPTS = [[5, 9, 3, 22, 7, 31, 4, 8, 11, 40, 2], [12, 6], [33, 5, 17, 21, 9], [50]]


def load(path: Path) -> Any:
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


def sampler(words: int = 67, *, stop: tuple[int, ...] = (), count: int = 9, batch: int = 256) -> Sampler:
    stops = torch.zeros(words, dtype=torch.bool)
    stops[list(stop)] = True
    return Sampler(stops, words, count, batch)


def stock_log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(prompt) - 1 + place, word]) for place, word in enumerate(response))


@pytest.mark.parametrize("family", [name for name, config in TINY.items() if not Shape.of(config).unpadded])
def test_left_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    """Every family: the words drawn in a batch are those drawn alone; both log-probabilities are the stock ones."""
    model = load(make_model(tmp_path / "m", family))
    draws = sampler(stop=STOPS)
    together = draws.sample(model, PROMPTS, 2, 7, 1)
    one_by_one = sampler(stop=STOPS, batch=1).sample(model, PROMPTS, 2, 7, 1)
    assert together.tokens() == one_by_one.tokens()
    assert min(map(len, together.tokens())) < 9, "no response ended early"
    found = log_probs(model, together, 67)
    for row, response in enumerate(together.tokens()):
        assert found[row].item() == pytest.approx(stock_log_prob(model, PROMPTS[row // 2], response), abs=2e-4)


@pytest.mark.parametrize("family", [name for name, config in TINY.items() if Shape.of(config).unpadded])
def test_a_bias_before_a_convolution_makes_padding_matter(family: str, tmp_path: Path) -> None:
    """What families declare is true, and `align` refuses such models."""
    path = make_model(tmp_path / "m", family)
    model = load(path)
    good = sampler(stop=STOPS).sample(model, PROMPTS, 1, 7, 1)
    found = log_probs(model, good, 67)
    stock = [stock_log_prob(model, PROMPTS[row], response) for row, response in enumerate(good.tokens())]
    assert max(abs(found[row].item() - value) for row, value in enumerate(stock)) > 1e-3


def test_padding_matters_to_the_test(tmp_path: Path) -> None:
    """Control: without the mask, padding does change log-probabilities."""
    model = load(make_model(tmp_path / "m"))
    good = sampler().sample(model, PROMPTS, 1, 0)
    wrong = Responses(good.ids, torch.ones_like(good.real), good.start)
    apart = (log_probs(model, good, 67) - log_probs(model, wrong, 67)).abs()
    assert apart[0] < 1e-4 and (apart[1:] > 1e-2).all()


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_the_batch_decides_nothing(batch: int, tmp_path: Path) -> None:
    """Prompts together, one prompt's responses in parts, rows that leave when they end: the same words."""
    model = load(make_model(tmp_path / "m"))
    stop = tuple(range(0, 67, 5))
    expected = sampler(stop=stop).sample(model, PROMPTS, 5, 3)
    assert sampler(stop=stop, batch=batch).sample(model, PROMPTS, 5, 3).tokens() == expected.tokens()
    assert len({len(row) for row in expected.tokens()}) > 3


def test_seed_decides(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "m"))
    draws = sampler()
    first = draws.sample(model, PROMPTS, 3, 0, 5).tokens()
    assert draws.sample(model, PROMPTS, 3, 0, 5).tokens() == first
    assert draws.sample(model, PROMPTS, 3, 0, 6).tokens() != first
    assert len({tuple(row) for row in first}) == 12


def test_a_response_ends_with_its_stop_token(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "m"))
    stop = tuple(range(0, 67, 4))
    made = sampler(stop=stop, count=30).sample(model, PROMPTS, 8, 3)
    rows = made.tokens()
    assert len({len(row) for row in rows}) > 3
    for row in rows:
        assert not set(row[:-1]) & set(stop)
        assert row[-1] in stop or len(row) == 30
    assert made.lengths.tolist() == [len(row) for row in rows]
    assert not made.ids[~made.real].any()


def test_rows_and_join(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "m"))
    made = sampler(stop=(2, 9, 30)).sample(model, PROMPTS, 2, 3)
    parts = [made[[0, 3]], made[4:6], made[[7]]]
    assert parts[2].start == 1 and parts[2].ids.shape[1] == 1 + len(made.tokens()[7])
    joined = Responses.join(parts)
    assert joined.tokens() == [made.tokens()[row] for row in (0, 3, 4, 5, 7)]
    whole, some = log_probs(model, made, 67), log_probs(model, joined, 67)
    assert torch.allclose(whole[[0, 3, 4, 5, 7]], some, atol=1e-5)


def test_gradient_in_chunks_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_model(tmp_path / "m"))
    made = sampler().sample(model, PROMPTS, 1, 3)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        (log_probs(model, made, 67) * weights).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients()
    monkeypatch.setattr("minitron_cli.align.sampling.LOGITS", 67 * 5)
    for a, b in zip(whole, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()) + 1e-6)


def test_words_beyond_the_tokenizer_are_never_drawn(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "m"))
    made = sampler(words=20, count=20).sample(model, PROMPTS, 4, 1)
    assert max(word for row in made.tokens() for word in row) < 20
    with torch.no_grad():
        scores = model(made.ids[:1], attention_mask=made.real[:1].long()).logits[0, :, :20].double().log_softmax(-1)
    start, row = made.start, made.tokens()[0]
    expected = sum(float(scores[start - 1 + place, word]) for place, word in enumerate(row))
    assert log_probs(model, made, 20)[0].item() == pytest.approx(expected, abs=1e-4)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5, float("-inf"), 0.3]).expand(200_000, -1)
    chances = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits, chances), minlength=6) / 200_000
    assert torch.allclose(counts, logits[0].softmax(-1), atol=4e-3) and counts[4] == 0


def test_draws_at_the_ends() -> None:
    """0 is the first word that has any probability, the largest number below 1 the last one."""
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_left_padded() -> None:
    ids, real = left_padded([[1, 2, 3], [4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert real.tolist() == [[True] * 3, [False, False, True]]
