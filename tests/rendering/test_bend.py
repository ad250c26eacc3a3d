"""The bend of depth maps against the closed forms of planes and spheres."""

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.rendering.bend import bend

CAMERAS = orbit(3, 4.0, 20.0, 31.0, 48, 40)


def depths(distance_along):
    """Depth maps [V,H,W], float64, of what `distance_along(origins, directions)` finds, and where it does."""
    maps = []
    for i in range(len(CAMERAS)):
        o, d = (x.double() for x in CAMERAS.image_rays(i))
        maps.append(distance_along(o, d).view(CAMERAS.height, CAMERAS.width))
    depth = torch.stack(maps)
    return depth.nan_to_num(0), depth.isfinite().double()


def sphere(radius):
    def along(o, d):
        b = (o * d).sum(1)
        return -b - (b * b - (o * o).sum(1) + radius**2).sqrt()

    return depths(along)


@pytest.mark.parametrize("normal", [(1, 0, 0), (1, 1, 0.3), (0.2, -0.5, 1)])
def test_a_plane_does_not_bend_however_it_is_seen(normal):
    n = torch.tensor(normal).double()
    depth, _ = depths(lambda o, d: (1.0 - o @ n) / (d @ n))
    depth, seen = depth.where(depth > 0, 0), (depth > 0).double()
    assert bend(depth, seen, CAMERAS).max() < 1e-6  # rays are float32
    rough = depth + 0.01 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(0))
    assert bend(rough, seen, CAMERAS).min() > 0.01


def test_a_sphere_bends_by_its_curvature_and_a_pixel():
    # at the middle of a sphere of radius r, seen from a distance d, the slope changes by (d − r) / (f r) each pixel
    cameras = orbit(1, 4.0, 20.0, 31.0, 401, 401)
    o, d = (x.double() for x in cameras.image_rays(0))
    for radius in (0.5, 1.0):
        b = (o * d).sum(1)
        depth = (-b - (b * b - (o * o).sum(1) + radius**2).sqrt()).view(1, 401, 401)
        middle = torch.zeros(1, 401, 401)
        middle[:, 199:202, 199:202] = 1
        kappa = (4.0 - radius) / (cameras.fx.item() * radius)
        expected = 6 * kappa**2 / (1 + kappa**2) / 401**2  # three runs of three pixels in both directions
        assert bend(depth.nan_to_num(0), middle, cameras).item() == pytest.approx(expected, rel=0.02)


def test_a_smooth_ball_bends_less_than_a_dented_one_and_edges_pull_little():
    depth, seen = sphere(1.0)
    dented = depth + 0.03 * torch.sin(torch.arange(48) * 0.9) * seen
    assert bend(dented, seen, CAMERAS).min() > 1.5 * bend(depth, seen, CAMERAS).max()
    step = torch.full((3, 40, 48), 4.0).double()
    step[:, :, 24:] = 6.0  # an edge
    step.requires_grad_()
    (at_edge,) = torch.autograd.grad(bend(step, torch.ones(3, 40, 48), CAMERAS).sum(), step)
    dent = torch.full((3, 40, 48), 4.0).double()
    dent[:, :, 24:] += 0.01
    dent.requires_grad_()
    (at_dent,) = torch.autograd.grad(bend(dent, torch.ones(3, 40, 48), CAMERAS).sum(), dent)
    assert at_edge.abs().max() < 0.1 * at_dent.abs().max()


def test_its_gradient_is_right_and_what_is_not_seen_has_none():
    depth, _ = sphere(1.0)
    noise = 0.01 * torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    depth = (depth[:1, 17:23, 21:27] + noise).requires_grad_()
    cameras, there = CAMERAS[0].resized(6, 6), torch.ones(1, 6, 6)
    assert torch.autograd.gradcheck(lambda d: bend(d, there, cameras), (depth,))
    there[:, :, 3:] = 0.4
    (gradient,) = torch.autograd.grad(bend(depth, there, cameras).sum(), depth)
    assert gradient[:, :, 3:].abs().max() == 0
    assert gradient[:, :, :3].abs().max() > 0


@pytest.mark.parametrize("side", [1, 2])
def test_pictures_of_two_pixels_do_not_bend(side):
    depth = torch.full((3, side, side), 4.0)
    assert bend(depth, torch.ones_like(depth), CAMERAS.resized(side, side)).tolist() == [0, 0, 0]
