"""The change of variables between flow matching and diffusion, against closed forms."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from csd3d.priors import Condition
from csd3d.priors.families.sd3 import forward
from csd3d.priors.flow import flow_alphas, flow_schedule, flow_time
from csd3d.priors.mixture import mixture_noise
from csd3d.priors.parameterisation import to_epsilon

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
CONDITION = Condition(torch.zeros(6, 1, 1), pooled=torch.zeros(6, 1))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flow_noise(transformer, z_t, alpha_bar, condition, timesteps):
    """ε of a velocity predictor, as a prior of a flow model goes about it."""
    velocity = forward(transformer, z_t, torch.zeros(len(z_t)), alpha_bar, condition, timesteps)
    return to_epsilon(velocity, z_t, alpha_bar, "flow")


def test_times_and_noise_levels_are_each_others_inverse():
    s = torch.linspace(1e-4, 1 - 1e-4, 101, dtype=torch.float64)
    alpha_bar = flow_alphas(s)
    torch.testing.assert_close(flow_time(alpha_bar), s, **EXACT)
    torch.testing.assert_close(s / (1 - s), ((1 - alpha_bar) / alpha_bar).sqrt(), **EXACT)


def test_the_noise_of_a_true_pair_comes_back():
    """z_t is made of x_0 and ε; the network, which knows both, must be asked at x_s and its velocity give ε."""
    x_0, eps = draw(6, 4, 3, 5), draw(6, 4, 3, 5, seed=1)
    alpha_bar = torch.tensor([1 - 1e-6, 0.9, 0.5, 0.1, 1e-3, 1e-7], dtype=torch.float64)
    a, sigma = (value.sqrt().view(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))

    def transformer(hidden_states, timestep, encoder_hidden_states, pooled_projections):
        s = (timestep / 1000).view(-1, 1, 1, 1)
        torch.testing.assert_close(hidden_states, (1 - s) * x_0 + s * eps, **EXACT)
        return eps - x_0

    found = flow_noise(transformer, a * x_0 + sigma * eps, alpha_bar, CONDITION, 1000)
    torch.testing.assert_close(found, eps, **EXACT)


def test_the_velocity_of_a_gaussian_gives_its_score():
    """Data N(μ, τ²): E[ε − x_0 | x_s] in closed form, against the ε that a diffusion model of it predicts."""
    mean, tau = draw(12), 0.7

    def transformer(hidden_states, timestep, encoder_hidden_states, pooled_projections):
        s = (timestep / 1000).view(-1, 1, 1, 1)
        offset = hidden_states - (1 - s) * mean.view(1, 3, 2, 2)
        variance = (1 - s) ** 2 * tau**2 + s**2
        x_0 = mean.view(1, 3, 2, 2) + (1 - s) * tau**2 / variance * offset
        return s / variance * offset - x_0

    z_t, alpha_bar = draw(6, 3, 2, 2, seed=2), flow_alphas(torch.tensor([0.003, 0.1, 0.4, 0.6, 0.9, 0.999]))
    expected = mixture_noise(
        z_t.flatten(1), alpha_bar, mean[None], torch.full((1,), tau).double(), torch.zeros(6, 1).double()
    )
    found = flow_noise(transformer, z_t, alpha_bar, CONDITION, 1000)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-7, atol=1e-7)  # alpha_bar's s was float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_the_models_own(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    alphas = flow_schedule(scheduler, tokens=1024)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(flow_time(alphas)[:-1], (shift * u / (1 + (shift - 1) * u))[:-1], rtol=1e-5, atol=1e-6)
    held = alphas.float()
    assert 0 < held[-1] < held[-2]  # pure noise would leave no signal to divide by
    assert held[0] < 1
    assert (held.diff() < 0).all()


def test_a_shift_by_resolution_is_the_pipelines():
    for tokens in (256, 1024, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
        s = flow_time(flow_schedule(scheduler, tokens)).flip(0)
        scheduler.set_timesteps(sigmas=[0.8, 0.5, 0.1], mu=calculate_shift(tokens, max_shift=1.15))
        torch.testing.assert_close(s[[200, 500, 900]].float(), scheduler.sigmas[:3], rtol=1e-5, atol=1e-6)


def test_float32_tables_lose_nothing_that_matters():
    """With ᾱ held in float32, as a prior does, ε is exact for the z_t that this same ᾱ makes, from first t to last."""
    alphas = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 1024).float()
    x_0, eps = draw(6, 4, 3, 3, dtype=torch.float32), draw(6, 4, 3, 3, seed=1, dtype=torch.float32)
    alpha_bar = alphas[[0, 1, 300, 700, 998, 999]]
    a, sigma = (value.sqrt().view(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))
    found = flow_noise(lambda **_: eps - x_0, a * x_0 + sigma * eps, alpha_bar, CONDITION, 1000)
    torch.testing.assert_close(found, eps, rtol=1e-5, atol=2e-6)


def test_pooled_text_is_asked_for():
    with pytest.raises(ValueError, match="pooled"):
        flow_noise(lambda **_: None, draw(1, 1, 1, 1), torch.tensor([0.5]), Condition(torch.zeros(1, 1, 1)), 1000)
