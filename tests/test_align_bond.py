"""Best-of-N distillation on finite outcome spaces (arXiv 2407.14622): closed forms, exact and sampled gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitron_cli.align import bond, weights

KINDS = [torch.float64, torch.float32]


def toy(seed: int = 0, outcomes: int = 20) -> tuple[Tensor, Tensor]:
    """A peaked reference and rewards without ties."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(outcomes, generator=generator, dtype=torch.float64).softmax(-1)
    return ref, torch.randn(outcomes, generator=generator, dtype=torch.float64)


def telescoped(ref: Tensor, rewards: Tensor, n: int) -> Tensor:
    """at_most^n - lower^n, for rewards without ties."""
    lower, at_most = bond.quantiles(ref, rewards)
    return at_most**n - lower**n


def binomial(ref: Tensor, rewards: Tensor, n: int) -> Tensor:
    """i of the n samples are the output, the others worse; for rewards without ties."""
    lower, _ = bond.quantiles(ref, rewards)
    return sum((math.comb(n, i) * lower ** (n - i) * ref**i for i in range(1, n + 1)), torch.zeros_like(ref))


def by_enumeration(ref: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Every draw of n outcomes; each of the best takes its share."""
    result = torch.zeros_like(ref)
    for drawn in itertools.product(range(len(ref)), repeat=n):
        top = max(float(rewards[i]) for i in drawn)
        winners = [i for i in drawn if float(rewards[i]) == top]
        for i in winners:
            result[i] += math.prod(float(ref[j]) for j in drawn) / len(winners)
    return result


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_three_forms_agree(n: int) -> None:
    ref, rewards = toy()
    found = bond.best_of_n_distribution(ref, rewards, n)
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    for form in (telescoped, binomial):
        assert (found - form(ref, rewards, n)).abs().max() < 1e-12
    if n == 1:
        assert torch.equal(found, ref)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=5).filter(
        lambda pairs: any(mass for mass, _ in pairs)
    ),
    st.integers(1, 4),
)
def test_ties_are_broken_at_random(pairs: list[tuple[int, int]], n: int) -> None:
    """Against every possible draw; outcomes without probability, and groups of equals, included."""
    mass = torch.tensor([float(mass) for mass, _ in pairs], dtype=torch.float64)
    ref, rewards = mass / mass.sum(), torch.tensor([float(reward) for _, reward in pairs])
    found = bond.best_of_n_distribution(ref, rewards, n)
    assert torch.allclose(found, by_enumeration(ref, rewards, n), atol=1e-12)


def test_matches_monte_carlo() -> None:
    ref, rewards = toy()
    rewards = (2 * rewards).round()  # with ties
    draws = torch.multinomial(ref, 400_000 * 4, replacement=True, generator=torch.Generator().manual_seed(1)).view(
        -1, 4
    )
    place = weights.best(rewards[draws])
    winners = draws.gather(1, place[:, None])[:, 0]
    seen = torch.bincount(winners, minlength=20) / len(winners)
    assert distance(seen, bond.best_of_n_distribution(ref, rewards, 4)) < 0.005


@pytest.mark.parametrize("dtype", KINDS)
def test_keeps_the_type_and_stays_finite(dtype: torch.dtype) -> None:
    """Where an output has hardly any probability, differences of powers would cancel."""
    ref = torch.tensor([1e-30, 1e-12, 0.5, 0.5], dtype=torch.float64).to(dtype)
    found = bond.best_of_n_distribution(ref / ref.sum(), torch.tensor([3.0, 2.0, 1.0, 0.0]), 8)
    assert found.dtype == dtype and found.isfinite().all()
    assert found[0].item() == pytest.approx(8e-30, rel=1e-5) and found[1].item() == pytest.approx(8e-12, rel=1e-5)


def test_correction_lies_between_one_and_n() -> None:
    ref, rewards = toy()
    a, b = bond.best_of_n_factors(ref, rewards, 8)
    worst = int(rewards.argmin())
    assert ((b >= 1) & (b <= 8)).all() and b[worst] == 1
    assert (ref * a * b)[worst].item() == pytest.approx(ref[worst].item() ** 8)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [2, 5])
def test_binary_reward(p: float, n: int) -> None:
    ref = torch.tensor([1 - p, p / 3, 2 * p / 3], dtype=torch.float64)
    found = bond.best_of_n_distribution(ref, torch.tensor([0.0, 1.0, 1.0]), n)
    assert found[1:].sum().item() == pytest.approx(1 - (1 - p) ** n)
    assert (found[2] / found[1]).item() == pytest.approx(2)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (2, 4), (4, 3)])
def test_best_of_n_repeated_is_best_of_n_to_the_m(n: int, m: int) -> None:
    ref, rewards = toy()
    for tied in (rewards, rewards.round()):
        policy = ref
        for _ in range(m):
            policy = bond.best_of_n_distribution(policy, tied, n)
        assert (policy - bond.best_of_n_distribution(ref, tied, n**m)).abs().max() < 1e-12


@pytest.mark.parametrize("change", [torch.exp, lambda r: 2 * r + 3, lambda r: r**3])
def test_only_the_order_of_rewards_counts(change: object) -> None:
    ref, rewards = toy()
    other = change(rewards)  # type: ignore[operator]
    assert torch.equal(bond.best_of_n_distribution(ref, rewards, 8), bond.best_of_n_distribution(ref, other, 8))
    drawn = torch.randint(20, (64, 17), generator=torch.Generator().manual_seed(0))
    ratio = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    found, again = [
        (
            weights.bond_backward(r[drawn[:, :1]], r[drawn[:, 1:]], ratio, 8, 0.5),
            weights.jbond_backward(r[drawn[:, :1]], r[drawn[:, 1:3]], ratio, 0.5, 1.0),
            weights.best(r[drawn]),
        )
        for r in (rewards, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


TABLE = {
    2: (0.19315, 0.3069, 0.66667),
    4: (0.63629, 1.6137, 0.80000),
    8: (1.20444, 4.9206, 0.88889),
    16: (1.83509, 12.2274, 0.94118),
}


@pytest.mark.parametrize("n", TABLE)
def test_closed_forms(n: int) -> None:
    forward, backward, wins = TABLE[n]
    assert bond.kl_best_of_n(n) == pytest.approx(forward, abs=5e-6)
    assert bond.kl_to_best_of_n(n) == pytest.approx(backward, abs=5e-5)
    assert bond.win_rate(n) == pytest.approx(wins, abs=5e-6)


@pytest.mark.parametrize(
    ("outcomes", "kl", "wins"),
    [(3, 0.93280, 0.82028), (10, 1.17749, 0.88227), (100, 1.20417, 0.88882), (1000, 1.20444, 0.88889)],
)
def test_discrete_spaces_stay_below_the_bounds(outcomes: int, kl: float, wins: float) -> None:
    """Uniform reference, N = 8; ties count half a win."""
    ref = torch.full((outcomes,), 1 / outcomes, dtype=torch.float64)
    rewards = torch.arange(outcomes, dtype=torch.float64)
    found = bond.best_of_n_distribution(ref, rewards, 8)
    lower, at_most = bond.quantiles(ref, rewards)
    assert bond.kl_divergence(found, ref).item() == pytest.approx(kl, abs=5e-6)
    assert (found * (lower + at_most) / 2).sum().item() == pytest.approx(wins, abs=5e-6)
    assert bond.kl_divergence(found, ref) < bond.kl_best_of_n(8)


def test_best_of_n_is_the_optimum_of_its_reward() -> None:
    """ref * exp((n - 1) r_BOND) is best-of-n with a normaliser of 1."""
    ref, rewards = toy()
    for n in (2, 4, 8):
        tilted = ref * torch.exp((n - 1) * bond.bond_reward(ref, rewards, n))
        assert (tilted - bond.best_of_n_distribution(ref, rewards, n)).abs().max() < 1e-12


def test_log_quantiles_are_smoothed() -> None:
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 5.0]])
    found = bond.log_quantile(torch.tensor([[0.0, 2.0, 5.0, 9.0]]), ref_rewards)
    assert found.exp().tolist()[0] == pytest.approx([1 / 5, 4 / 5, 1, 1])
    assert found.isfinite().all()


def test_jeffreys_and_its_gradients() -> None:
    """Both closed gradients against autograd, in the logits of a softmax policy."""
    ref, rewards = toy()
    logits = torch.randn(20, generator=torch.Generator().manual_seed(9), dtype=torch.float64, requires_grad=True)
    target = bond.best_of_n_distribution(ref, rewards, 4)
    for beta in (0.0, 0.3, 1.0):
        policy = logits.softmax(-1)
        (found,) = torch.autograd.grad(bond.jeffreys(policy, target, beta), logits)
        policy = policy.detach()
        forward = bond.forward_gradient(policy, target)
        backward = bond.backward_gradient(policy, ref, rewards, 4)
        assert torch.allclose(found, (1 - beta) * forward + beta * backward, atol=1e-12)
    assert bond.jeffreys(target, target, 0.5).item() == pytest.approx(0, abs=1e-12)


def test_kl_divergence_where_probabilities_are_zero() -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert bond.kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2))
    assert bond.kl_divergence(q, p).item() == math.inf


def test_jbond_reward() -> None:
    pair = torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    found = bond.jbond_reward(torch.tensor([[0.9, 1.0, 1.5, 3.0], [1.9, 2.0, 2.1, 0.0]]), pair)
    low = -math.log(16)
    assert found.tolist() == [pytest.approx([low, 0, 0, 0]), pytest.approx([low, 0, 0, low])]


@pytest.mark.parametrize(("quantile", "mean"), [(0.1, -2.246), (0.25, -1.560), (0.5, math.log(0.5)), (0.9, -0.028)])
def test_mean_jbond_reward(quantile: float, mean: float) -> None:
    """alpha (1 - p)^2, against the definition: a pair of which both are better."""
    pairs = torch.tensor(list(itertools.product([0.0, 2.0], repeat=2)), dtype=torch.float64)
    chances = torch.tensor([quantile, 1 - quantile], dtype=torch.float64)
    probability = torch.tensor([chances[int(a > 1)] * chances[int(b > 1)] for a, b in pairs])
    rewards = bond.jbond_reward(torch.ones(4, 1), pairs)[:, 0]
    assert (probability * rewards).sum().item() == pytest.approx(mean, abs=6e-4)


def jbond_gradient(policy: Tensor, anchor: Tensor, rewards: Tensor, beta: float, gamma: float) -> Tensor:
    """J-BOND's exact descent direction in logits, from the definition of each part."""
    _, at_most = bond.quantiles(anchor, rewards)
    ratio = policy.log() - anchor.log()
    value = bond.JBOND_PENALTY * (1 - at_most) ** 2 - ratio
    backward = -policy * (value - (policy * value).sum())
    regular = policy * (ratio - (policy * ratio).sum())
    forward = bond.forward_gradient(policy, bond.best_of_n_distribution(anchor, rewards, 2))
    return (1 - beta) * forward + beta * backward + gamma * regular


def descend(anchor: Tensor, rewards: Tensor, beta: float, gamma: float, steps: int = 1500) -> Tensor:
    logits = anchor.log().clone()
    for _ in range(steps):
        logits -= jbond_gradient(logits.softmax(-1), anchor, rewards, beta, gamma)
    return logits.softmax(-1)


def test_jbond_ends_at_its_fixed_point_and_not_at_best_of_two() -> None:
    anchor, rewards = toy()
    found = descend(anchor, rewards, 1.0, 0.0)
    assert distance(found, bond.jbond_fixed_point(anchor, rewards)) < 1e-3
    best_of_two = bond.best_of_n_distribution(anchor, rewards, 2)
    apart, start = bond.kl_divergence(found, best_of_two), bond.kl_divergence(best_of_two, anchor)
    assert 1e-3 < apart < 0.02 < start
    assert bond.kl_divergence(descend(anchor, rewards, 0.5, 0.0), best_of_two) < apart


def test_gamma_lowers_the_kl() -> None:
    """The sign that the paper's pseudo-code prints raises it."""
    anchor, rewards = toy()
    kls = [bond.kl_divergence(descend(anchor, rewards, 0.5, gamma, 800), anchor).item() for gamma in (0, 0.5, 1, 2)]
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0.3 * kls[0]


def test_sampled_jbond_weights_have_the_exact_gradient() -> None:
    """The mean over many batches of sum(weight * grad log policy) is minus `jbond_gradient`'s policy-gradient parts."""
    anchor, rewards = toy(3, 6)
    policy = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    own = torch.multinomial(policy, 400_000, replacement=True, generator=generator)
    pairs = torch.multinomial(anchor, 800_000, replacement=True, generator=generator).view(-1, 2)
    ratio = (policy.log() - anchor.log())[own][:, None]
    found = weights.jbond_backward(rewards[own][:, None], rewards[pairs], ratio, 0.7, 0.4)[:, 0]
    scores = torch.nn.functional.one_hot(own, 6) - policy
    exact = jbond_gradient(policy, anchor, rewards, 0.7, 0.4)
    exact = exact - 0.3 * bond.forward_gradient(policy, bond.best_of_n_distribution(anchor, rewards, 2))
    assert torch.allclose(-(found[:, None] * scores).mean(0), exact, atol=4e-3)
    assert exact.abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_exact_gradients_reach_best_of_n(n: int, beta: float) -> None:
    ref, rewards = toy()
    target = bond.best_of_n_distribution(ref, rewards, n)
    logits = ref.log().clone()
    for _ in range(3000):
        policy = logits.softmax(-1)
        step = (1 - beta) * bond.forward_gradient(policy, target)
        logits -= step + (beta * bond.backward_gradient(policy, ref, rewards, n) if beta else 0)
    policy = logits.softmax(-1)
    assert bond.kl_divergence(policy, target) < 5e-3 and bond.kl_divergence(target, policy) < 5e-3


def trained_on_samples(n: int, beta: float, k: int = 16, batch: int = 128, steps: int = 1500) -> Tensor:
    """What the trainer does, with a table in place of a model."""
    ref, rewards = toy()
    generator = torch.Generator().manual_seed(0)
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        chances = logits.log_softmax(-1)
        own = torch.multinomial(chances.detach().exp(), batch, replacement=True, generator=generator)[:, None]
        anchors = torch.multinomial(ref, batch * k, replacement=True, generator=generator).view(batch, k)
        ratio = chances.detach()[own] - ref.log()[own]
        weight = weights.bond_backward(rewards[own], rewards[anchors], ratio, n, beta)
        chosen = anchors.gather(1, weights.best(rewards[anchors[:, :n]])[:, None])
        loss = -((weight * chances[own]).sum() + (1 - beta) * chances[chosen].sum()) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_sampled_training_reaches_best_of_n(n: int, beta: float) -> None:
    ref, rewards = toy()
    target, policy = bond.best_of_n_distribution(ref, rewards, n), trained_on_samples(n, beta)
    assert bond.kl_divergence(ref, target) > 0.5 and bond.kl_divergence(target, ref) > 0.5
    assert bond.kl_divergence(policy, target) <= 0.05
    assert bond.kl_divergence(target, policy) <= 0.05


def test_moving_anchor_climbs_and_collapses() -> None:
    """With an anchor that follows, the mean quantile only rises, and the end is the best output alone."""
    ref, rewards = toy()
    _, at_most = bond.quantiles(ref, rewards)
    logits, anchor_logits = ref.log().clone(), ref.log().clone()
    means = []
    for _ in range(3000):
        policy, anchor = logits.softmax(-1), anchor_logits.softmax(-1)
        means.append((policy * at_most).sum().item())
        logits -= jbond_gradient(policy, anchor, rewards, 0.5, 0.0)
        anchor_logits += 0.02 * (logits - anchor_logits)
    assert all(later > earlier - 1e-9 for earlier, later in itertools.pairwise(means))
    best = rewards.argmax()
    assert bond.kl_divergence(logits.softmax(-1), ref).item() == pytest.approx(-ref[best].log().item(), abs=0.05)


def test_leave_one_out() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]
    assert bond.leave_one_out(values).tolist() == [pytest.approx(row) for row in expected]
    assert bond.leave_one_out(torch.tensor([[5.0]])).tolist() == [[5.0]]


def test_reinforce_compares_the_samples_of_one_prompt() -> None:
    found = weights.reinforce(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 1.5]]), 2.0)
    assert found.tolist() == [[pytest.approx(0.0), pytest.approx(0.0)]]
    assert weights.reinforce(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), 2.0).tolist() == [[-2.0, 2.0]]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_subsets(n: int) -> None:
    rewards = torch.tensor([3.0, -1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    subsets = [max(each) for each in itertools.combinations(rewards.tolist(), n)]
    assert bond.expected_best(rewards, n).item() == pytest.approx(sum(subsets) / len(subsets))
    with pytest.raises(ValueError, match="no subset"):
        bond.expected_best(rewards, 6)
