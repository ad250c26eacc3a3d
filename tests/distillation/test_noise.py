"""Noise sources and timestep schedules."""

import math

import pytest
import torch

from csd3d.distillation.noise import add_noise, draw_noise, draw_noise_map, world_noise
from csd3d.distillation.schedule import annealed_fraction, stage, step_weight, timestep, uniform_timestep


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shared_noise_is_one_draw_and_keeps_distances():
    z = torch.randn(4, 2, 8, 8, generator=seeded(), dtype=torch.float64)
    eps = draw_noise(z, "shared", seeded(1))
    assert all(torch.equal(eps[i], eps[0]) for i in range(4))
    z_t = add_noise(z, eps, 0.3)
    expected = math.sqrt(0.3) * torch.pdist(z.flatten(1))
    torch.testing.assert_close(torch.pdist(z_t.flatten(1)), expected, rtol=1e-12, atol=0.0)


def test_independent_noise_is_white_across_particles():
    eps = draw_noise(torch.empty(3, 4, 64, 64), "independent", seeded(2)).flatten(1)
    gram = eps @ eps.T / eps.shape[1]
    torch.testing.assert_close(gram, torch.eye(3), rtol=0.0, atol=5 / math.sqrt(eps.shape[1]))


@pytest.mark.parametrize("kind", ["independent", "shared"])
def test_noise_is_a_function_of_the_generator_alone(kind):
    z = torch.zeros(2, 3, 4)
    torch.manual_seed(0)
    first = draw_noise(z, kind, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(draw_noise(z, kind, seeded(3)), first)
    assert not torch.equal(draw_noise(z, kind, seeded(4)), first)


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match="noise is 'white': choose one of independent, shared"):
        draw_noise(torch.zeros(2, 3), "white", seeded())


def test_add_noise_keeps_unit_variance():
    z, eps = torch.randn(2, 100000, generator=seeded(5))
    assert add_noise(z, eps, 0.37).var().item() == pytest.approx(1.0, abs=0.02)


def test_timesteps_of_fractions():
    assert [timestep(f, 1000) for f in (0.0, 0.02, 0.5, 0.98, 1.0)] == [0, 20, 500, 980, 999]


def test_uniform_timesteps_fill_the_range_and_no_more():
    generator = seeded(6)
    drawn = {uniform_timestep(0.02, 0.5, 100, generator) for _ in range(2000)}
    assert drawn == set(range(2, 51))


def test_annealing_is_linear_and_reaches_both_ends():
    assert [annealed_fraction(k, 5, 0.1, 0.9) for k in range(5)] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert annealed_fraction(0, 1, 0.1, 0.9) == 0.9


def test_stage_switches_at_its_step():
    assert [stage(k, 10, 0.8) for k in (0, 7, 8, 9)] == [1, 1, 2, 2]


def test_x0_weight_measures_directions_in_latents():
    """z − ẑ_0 = (σ/√ᾱ)(ε^ω − ε) for any prediction."""
    z, eps, predicted = torch.randn(3, 10, generator=seeded(7), dtype=torch.float64)
    for alpha_bar in (0.99, 0.5, 0.01):
        z_t = add_noise(z, eps, alpha_bar)
        z0 = (z_t - math.sqrt(1 - alpha_bar) * predicted) / math.sqrt(alpha_bar)
        torch.testing.assert_close(step_weight("x0", alpha_bar) * (predicted - eps), z - z0, rtol=1e-9, atol=1e-9)
    assert step_weight("sigma2", 0.3) == pytest.approx(0.7)
    assert step_weight("one", 0.3) == 1.0
    with pytest.raises(ValueError, match="weight is 'snr'"):
        step_weight("snr", 0.3)


def test_world_noise_is_white_and_a_function_of_the_camera():
    noise_map = draw_noise_map(4, (16, 16), 40.0, torch.Generator().manual_seed(0))
    azimuth, elevation = torch.tensor([10.0, 10.0, 190.0]), torch.tensor([0.0, 0.0, 30.0])
    eps = world_noise(noise_map, azimuth, elevation, (16, 16))
    assert eps.shape == (3, 4, 16, 16)
    assert torch.equal(eps[0], eps[1])
    assert eps.std().item() == pytest.approx(1, abs=0.05)
    assert abs((eps[0] * eps[2]).mean().item()) < 0.1  # views that share no direction share no noise


def test_world_noise_turns_with_the_camera_and_closes_after_a_turn():
    noise_map = draw_noise_map(1, (8, 8), 45.0, torch.Generator().manual_seed(0))
    per_pixel = 360 / noise_map.shape[2]
    turned = world_noise(noise_map, torch.tensor([0.0, 3 * per_pixel, 360.0]), torch.zeros(3), (8, 8))
    assert torch.equal(turned[1, 0, :, :5], turned[0, 0, :, 3:])
    assert torch.equal(turned[2], turned[0])
    raised = world_noise(noise_map, torch.zeros(2), torch.tensor([0.0, 2 * 45.0 / 8]), (8, 8))
    assert torch.equal(raised[1, 0, 2:], raised[0, 0, :6])  # looking up moves the window up the map


def test_world_noise_stays_inside_the_map_at_the_poles():
    noise_map = draw_noise_map(1, (8, 12), 60.0, torch.Generator().manual_seed(0))
    eps = world_noise(noise_map, torch.tensor([0.0, 359.9]), torch.tensor([90.0, -90.0]), (8, 12))
    assert eps.shape == (2, 1, 8, 12)
