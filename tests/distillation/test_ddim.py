"""DDIM against the closed-form flow of a Gaussian prior, whose noise prediction is exact."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from csd3d.distillation.ddim import ddim_edit, ddim_invert, ddim_sample, ddim_step, ddim_timesteps
from csd3d.distillation.noise import add_noise, draw_noise

MEAN, VARIANCE = 1.5, 0.09


def schedule(T: int = 1000) -> Tensor:
    """Stable Diffusion's scaled-linear schedule, in float64, cut into T timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2 * (1000 / T)
    return torch.cumprod(1 - betas, dim=0)


def exact_eps(alphas: Tensor):
    def predict(z_t: Tensor, t: int) -> Tensor:
        a = alphas[t].item()
        return math.sqrt(1 - a) * (z_t - math.sqrt(a) * MEAN) / (a * VARIANCE + 1 - a)

    return predict


def flow_to_clean(z_t: Tensor, alpha_bar: float) -> Tensor:
    """The probability-flow ODE of N(m, s²) keeps the quantile: (z_0 − m)/s = (z_t − √ᾱ m)/√(ᾱ s² + 1 − ᾱ)."""
    quantile = (z_t - math.sqrt(alpha_bar) * MEAN) / math.sqrt(alpha_bar * VARIANCE + 1 - alpha_bar)
    return MEAN + math.sqrt(VARIANCE) * quantile


def flow_error(steps: int, start: int = 36000) -> float:
    alphas = schedule(40000)
    z_t = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = ddim_sample(exact_eps(alphas), z_t, alphas, ddim_timesteps(start, steps))
    return (clean - flow_to_clean(z_t, alphas[start].item())).abs().max().item()


def test_many_steps_reach_the_closed_form_flow():
    errors = [flow_error(steps) for steps in (100, 400, 1600)]
    assert errors[2] < 0.01
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # nearly first order: evenly spaced t meets σ ~ √t at the end


def test_one_step_is_the_posterior_mean():
    alphas = schedule()
    z_t = torch.linspace(-3, 3, 7, dtype=torch.float64)
    a = alphas[600].item()
    gain = math.sqrt(a) * VARIANCE / (a * VARIANCE + 1 - a)
    expected = MEAN + gain * (z_t - math.sqrt(a) * MEAN)
    torch.testing.assert_close(ddim_sample(exact_eps(alphas), z_t, alphas, [600]), expected, rtol=1e-10, atol=1e-10)


def test_a_step_with_the_true_noise_moves_along_the_noising_path():
    z, eps = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for after in (0.7, 1.0):
        moved = ddim_step(add_noise(z, eps, 0.2), eps, 0.2, after)
        torch.testing.assert_close(moved, add_noise(z, eps, after), rtol=1e-12, atol=1e-12)


def test_timesteps_fall_evenly_from_the_start():
    assert ddim_timesteps(500, 5) == [500, 400, 300, 200, 100]
    assert ddim_timesteps(3, 20) == [3, 2, 1, 0]
    assert ddim_timesteps(0, 4) == [0]
    for start in (1, 19, 57, 980):
        steps = ddim_timesteps(start, 20)
        assert steps[0] == start
        assert all(a > b for a, b in pairwise(steps))
    with pytest.raises(ValueError, match="steps 0"):
        ddim_timesteps(10, 0)


def test_inversion_follows_the_flow_up_and_sampling_comes_back():
    alphas, z = schedule(40000), torch.linspace(0.5, 2.5, 9, dtype=torch.float64)
    up, down = [], []
    for steps in (100, 400, 1600):
        falling = ddim_timesteps(36000, steps)
        z_t = ddim_invert(exact_eps(alphas), z, alphas, falling[::-1])
        up.append((flow_to_clean(z_t, alphas[36000].item()) - z).abs().max().item())
        down.append((ddim_sample(exact_eps(alphas), z_t, alphas, falling) - z).abs().max().item())
    for errors in (up, down):
        assert errors[2] < 0.01
        assert errors[0] > 2.5 * errors[1]
        assert errors[1] > 1.5 * errors[2]  # a floor stays: nothing lies between ᾱ = 1 and the first level


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_edit_noises_to_the_start_and_flows_back(noise):
    alphas, start = schedule(), 700
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    edited = ddim_edit(
        exact_eps(alphas), z, alphas, start=start, steps=700, generator=torch.Generator().manual_seed(2), noise=noise
    )
    eps = draw_noise(z, noise, torch.Generator().manual_seed(2))
    expected = flow_to_clean(add_noise(z, eps, alphas[start].item()), alphas[start].item())
    torch.testing.assert_close(edited, expected, rtol=0.0, atol=0.01)


def test_edit_at_a_low_level_keeps_the_source():
    alphas, z = schedule(), torch.full((2, 5), MEAN, dtype=torch.float64)
    edited = ddim_edit(exact_eps(alphas), z, alphas, start=0, steps=20, generator=torch.Generator().manual_seed(3))
    assert (edited - z).abs().max() < 3 * math.sqrt(1 - alphas[0].item())
