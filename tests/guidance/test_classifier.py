"""Classifier guidance against closed forms of Gaussians, and its gradient through a network against differences."""

import math

import pytest
import torch
from tiny_models import save_tiny_pipeline
from torch import Tensor

from csd3d.distillation.ddim import ddim_timesteps
from csd3d.distillation.guidance import cfg
from csd3d.distillation.method import Query
from csd3d.distillation.samplers import sample
from csd3d.errors import InputError
from csd3d.guidance.classifier import check_gradient, classifier_guided, clip_log_prob, guided_with_graph
from csd3d.priors import GaussianMixturePrior, PriorConfig, load_prior
from csd3d.priors.mixture import scaled_linear_alphas

MEAN, STD = 0.4, 0.7
ALPHAS = scaled_linear_alphas()


def exact_eps(mean: float, std: float = STD):
    def predict(z_t: Tensor, t: int) -> Tensor:
        a = ALPHAS[t].item()
        return math.sqrt(1 - a) * (z_t - math.sqrt(a) * mean) / (a * std**2 + 1 - a)

    return predict


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_a_linear_log_likelihood_moves_a_gaussian_by_scale_variance_and_slope(scale):
    """p(z) e^{s b z} of N(m, τ²) is N(m + s τ² b, τ²), at every noise level."""
    slope, z_t = -1.3, normal(50)
    guided = classifier_guided(exact_eps(MEAN), lambda z: slope * z, ALPHAS, scale)
    tilted = exact_eps(MEAN + scale * STD**2 * slope)
    for t in (5, 300, 999):
        torch.testing.assert_close(guided(z_t, t), tilted(z_t, t), rtol=1e-9, atol=1e-9)
    found, expected = (sample(of, z_t, ALPHAS, ddim_timesteps(999, 20)) for of in (guided, tilted))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_gaussian_likelihood_nears_the_posterior_as_the_noise_vanishes():
    """log p(y|z) = −(z − y)²/2r²: exact at z itself, and off by the spread of z given z_t at high noise."""
    y, r = 1.5, 0.6
    precision = 1 / STD**2 + 1 / r**2
    posterior = exact_eps((MEAN / STD**2 + y / r**2) / precision, precision**-0.5)
    guided = classifier_guided(exact_eps(MEAN), lambda z: -((z - y) ** 2) / (2 * r**2), ALPHAS, 1.0)
    z_t = normal(50)
    off = [((guided(z_t, t) - posterior(z_t, t)).abs().max() / posterior(z_t, t).abs().max()).item() for t in (400, 0)]
    assert off[0] > 0.1
    assert off[1] < 0.01


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")
    return load_prior(PriorConfig(model=str(folder), device="cpu", micro_batch=2), require="text")


def test_the_gradient_goes_through_the_network_and_the_decoder_to_clip(prior):
    t, z_t, along = 300, normal(1, 4, 4, 4, dtype=torch.float32), normal(1, 4, 4, 4, dtype=torch.float32).sign()
    predict = guided_with_graph(prior, "red", "", 3.0)
    value = clip_log_prob("", "a red chair", lambda z: prior.decode(z, (32, 32)), prior.device)
    guided = classifier_guided(predict, value, prior.alphas_cumprod, 1.0)
    a = prior.alphas_cumprod[t].item()

    def log_prob(z_t: Tensor) -> float:
        z0 = (z_t - (1 - a) ** 0.5 * predict(z_t, t)) / a**0.5
        return value(z0.detach().requires_grad_()).item()  # decoded without clamping

    gradient = (predict(z_t, t) - guided(z_t, t)) / (1 - a) ** 0.5
    step = 0.02
    slope = (log_prob(z_t + step * along) - log_prob(z_t - step * along)) / (2 * step)
    assert slope == pytest.approx((gradient * along).sum().item(), rel=0.05, abs=1e-3)
    assert gradient.abs().max() > 1e-3


def test_a_prediction_with_a_graph_is_the_priors(prior):
    z_t, prior.unet_evaluations = normal(3, 4, 4, 4, dtype=torch.float32), 0
    found = guided_with_graph(prior, "red", "", 3.0)(z_t, 400)
    assert prior.unet_evaluations == 6
    eps = prior.predict({"null": Query(z_t, 400, ("",) * 3), "text": Query(z_t, 400, ("red",) * 3)})
    torch.testing.assert_close(found, cfg(eps["null"], eps["text"], 3.0), rtol=1e-4, atol=1e-5)


def test_a_prior_without_a_network_is_refused(prior):
    check_gradient(prior)
    with pytest.raises(InputError, match=r"^sampling\.classifier_scale: it needs the gradient .* set it to 0$"):
        check_gradient(GaussianMixturePrior(torch.zeros(1, 3, 2, 2), torch.ones(1)))
