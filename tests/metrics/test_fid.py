"""The Fréchet distance against closed forms, and its name."""

import pytest
import torch
from scipy.linalg import sqrtm

from csd3d.metrics.fid import frechet_distance


def samples(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axes(scales):
    """Samples ± s_i along axis i: mean 0, covariance diag(2 s_i² / (2D − 1)) exactly."""
    return torch.cat([torch.diag(scales), -torch.diag(scales)])


def test_diagonal_covariances():
    a, b = torch.tensor([1.0, 2.0, 3.0, 0.0]).double(), torch.tensor([4.0, 2.0, 1.0, 5.0]).double()
    shift = torch.tensor([0.0, 1.0, 0.0, 2.0]).double()
    expected = 2 / 7 * (a - b).square().sum().item() + 5.0
    assert frechet_distance(axes(a), axes(b) + shift) == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_the_mean_alone():
    a, shift = samples(50, 6), samples(1, 6, seed=1)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_equal_sets_are_exactly_zero_apart():
    for count, width in ((40, 6), (6, 40), (2, 3)):
        a = samples(count, width).float()
        assert frechet_distance(a, a.clone()) == 0.0
        assert frechet_distance(a, a.flip(0)) == pytest.approx(0.0, abs=1e-25)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 45, 8), (5, 7, 30), (60, 5, 12)])
def test_rotations_and_order_change_nothing(n, m, width):
    a, b = samples(n, width), 2 * samples(m, width, seed=1) + 0.3
    rotation = torch.linalg.qr(samples(width, width, seed=2)).Q
    distance = frechet_distance(a, b)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a.flip(0), b) == pytest.approx(distance, rel=1e-10)


def test_it_is_the_definition():
    a, b = samples(80, 6) @ samples(6, 6, seed=3), samples(70, 6, seed=1) + 1
    cov_a, cov_b = a.T.cov().numpy(), b.T.cov().numpy()
    root = sqrtm(cov_a)
    cross = sqrtm(root @ cov_b @ root)
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (cov_a + cov_b - 2 * cross).trace().real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_fewer_samples_than_features():
    """Two samples each: covariances u uᵀ and v vᵀ, whose distance is |u|² + |v|² − 2 |u·v|."""
    u, v = samples(2, 64)
    half = 0.5**0.5
    a, b = torch.stack([half * u, -half * u]), torch.stack([half * v, -half * v])
    expected = (u @ u + v @ v - 2 * (u @ v).abs()).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_it_keeps_its_digits_far_from_the_origin():
    a, b = samples(30, 5), samples(30, 5, seed=1)
    assert frechet_distance(a + 1e4, b + 1e4) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_what_has_no_distance_is_refused():
    for a, b in ((samples(1, 3), samples(5, 3)), (samples(5, 3), samples(5, 4)), (samples(5, 3)[0], samples(5, 3))):
        with pytest.raises(ValueError, match="expected"):
            frechet_distance(a, b)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(samples(5, 3) / 0, samples(5, 3))
