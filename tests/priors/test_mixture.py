"""The mixture prior's ε against automatic differentiation of its log density."""

import math

import pytest
import torch
from asking import edit_branches
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from csd3d.priors import Condition, GaussianMixturePrior
from csd3d.priors.mixture import Bank, mixture_noise, posterior_mean

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -3.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.7, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.fixture
def prior():
    return GaussianMixturePrior(MEANS, STDS, WEIGHTS, {"left": torch.tensor([0.0, 1.0, 0.0])})


def score(prior, z_t, t, weights):
    """∇ log p_t by autograd on torch's own mixture density."""
    alpha_bar = prior.alphas_cumprod[t]
    scale = (alpha_bar * STDS**2 + 1 - alpha_bar).sqrt()[:, None].expand_as(MEANS)
    density = MixtureSameFamily(Categorical(weights), Independent(Normal(alpha_bar.sqrt() * MEANS, scale), 1))
    z_t = z_t.clone().requires_grad_()
    return torch.autograd.grad(density.log_prob(z_t).sum(), z_t)[0]


@pytest.mark.parametrize("t", [0, 20, 300, 980, 999])
def test_noise_is_minus_sigma_times_the_score(prior, t):
    z_t = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    expected = -(1 - prior.alphas_cumprod[t]).sqrt() * score(prior, z_t, t, WEIGHTS)
    condition = Condition(prior.embed([""]).expand(9, -1, -1))
    torch.testing.assert_close(prior.predict_noise(z_t, t, condition), expected, rtol=1e-9, atol=1e-9)


def test_prompts_choose_weights_and_timesteps_may_differ(prior):
    z_t = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([100, 700])
    eps = prior.predict_noise(z_t, t, Condition(prior.embed(["left", "other"])))
    alpha_bar = prior.alphas_cumprod[100]  # one component left: ε = σ (z_t − √ᾱ μ) / (ᾱ s² + σ²)
    closed = (
        (1 - alpha_bar).sqrt() * (z_t[0] - alpha_bar.sqrt() * MEANS[1]) / (alpha_bar * STDS[1] ** 2 + 1 - alpha_bar)
    )
    torch.testing.assert_close(eps[0], closed, rtol=1e-9, atol=1e-9)
    expected = -(1 - prior.alphas_cumprod[700]).sqrt() * score(prior, z_t[1:], 700, WEIGHTS)
    torch.testing.assert_close(eps[1:], expected, rtol=1e-9, atol=1e-9)


def test_prediction_recovers_the_noise_of_a_point_mass():
    """With a vanishing spread z is known, so the noise that was added is known: ε̂ = ε."""
    means = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    prior = GaussianMixturePrior(means, torch.tensor([1e-4]))
    eps = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    alpha_bar = prior.alphas_cumprod[400]
    z_t = alpha_bar.sqrt() * prior.encode(means) + (1 - alpha_bar).sqrt() * eps
    branches = edit_branches(prior.embed(["x"]), prior.embed([""]), prior.encode_condition(means).expand(5, -1, -1, -1))
    for branch in branches:
        torch.testing.assert_close(prior.predict_noise(z_t, 400, branch), eps, rtol=1e-4, atol=1e-4)
    assert prior.unet_evaluations == 15


def test_far_from_every_mode_it_stays_finite(prior):
    z_t = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=torch.float64)
    assert prior.predict_noise(z_t, 0, Condition(prior.embed(["", "left"]))).isfinite().all()


def test_unsuitable_input_is_named(prior):
    with pytest.raises(ValueError, match="stds"):
        GaussianMixturePrior(MEANS, STDS[:2])
    with pytest.raises(ValueError, match="stds"):
        GaussianMixturePrior(MEANS, STDS * 0)
    with pytest.raises(ValueError, match="match means"):
        prior.predict_noise(torch.zeros(1, 3, dtype=torch.float64), 5, Condition(prior.embed([""])))


def test_the_posterior_mean_is_bayes_rule():
    """Against sums in plain Python; rows with one bank, one with other weights and one with other points."""
    points = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [0.5, 3.0]], dtype=torch.float64)
    weighted = Bank(points, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
    banks = [Bank(points), weighted, Bank(points), Bank(points[:2].clone()), weighted]
    z_t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.7, 0.99], dtype=torch.float64)
    found = posterior_mean(z_t, alpha_bar, banks)
    for row, bank in enumerate(banks):
        root, variance = math.sqrt(alpha_bar[row]), 1 - float(alpha_bar[row])
        prior = [1.0] * len(bank.points) if bank.log_weights is None else bank.log_weights.exp().tolist()
        weights = [
            p
            * math.exp(
                -sum((float(z) - root * float(x)) ** 2 for z, x in zip(z_t[row], point, strict=True)) / (2 * variance)
            )
            for p, point in zip(prior, bank.points, strict=True)
        ]
        expected = sum(w / sum(weights) * point for w, point in zip(weights, bank.points, strict=True))
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_the_posterior_mean_is_the_limit_of_narrow_gaussians():
    z_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha_bar = torch.tensor([0.99, 0.6, 0.2, 0.01], dtype=torch.float64)
    clean = posterior_mean(z_t, alpha_bar, [Bank(MEANS, WEIGHTS.log())] * 4)
    root, sigma = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]
    eps = mixture_noise(z_t, alpha_bar, MEANS, torch.full((3,), 1e-6, dtype=torch.float64), WEIGHTS.log().expand(4, 3))
    torch.testing.assert_close((z_t - root * clean) / sigma, eps, rtol=1e-8, atol=1e-8)


def test_two_opposite_points_give_a_hyperbolic_tangent_and_all_noise_their_mean():
    a = torch.tensor([0.6, -0.8], dtype=torch.float64)
    bank, z_t = Bank(torch.stack([a, -a])), torch.tensor([[0.0, 0.0], [0.3, 0.1], [2.0, 5.0]], dtype=torch.float64)
    alpha_bar = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    found = posterior_mean(z_t, alpha_bar, [bank] * 3)
    expected = torch.tanh(alpha_bar.sqrt() * (z_t @ a) / (1 - alpha_bar))[:, None] * a
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not bool(found[0].any())  # the midpoint, from the midpoint
    assert not bool(found[2].any())
