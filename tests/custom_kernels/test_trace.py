"""The ray loop against march, density and transmittance in turn."""

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.rendering import OccupancyGrid, RenderConfig, render_image, render_rays
from csd3d.rendering.render import _lit, _points
from custom_kernels import rendering
from tests.custom_kernels.test_field import field, threads_restored  # noqa: F401 (a fixture)
from tests.custom_kernels.test_hashgrid import needs_native

pytestmark = needs_native
CONFIG = RenderConfig(steps=96, resolution=32)


def scene(unbounded=False, config=CONFIG, **options):
    """A field of haze and solid parts, and its occupancy grid."""
    found = field(unbounded, density_scale=20.0, **options)
    with torch.no_grad():
        found.density_net[2].weight[0] *= 8
    grid = OccupancyGrid(config, found.aabb, unbounded)
    grid.update(0, found, torch.Generator().manual_seed(0))
    return found, grid


def rays(count=300, seed=0):
    """Rays towards the box, some of which miss it, and their jitter."""
    generator = torch.Generator().manual_seed(seed)
    rays_o = 3.5 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    rays_d = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator) - rays_o, dim=1)
    return rays_o, rays_d, torch.rand(count, generator=generator)


def background(directions):
    return 0.5 + 0.5 * directions


def rendered(found, grid, backend, config=CONFIG, seed=0):
    """rgb, depth, opacity, then the gradients of all parameters; torch's networks if the backend is the reference."""
    found.config.backend = backend
    rays_o, rays_d, jitter = rays(seed=seed)
    result = render_rays(found, background, grid, rays_o, rays_d, config, jitter=jitter, distortion=True)
    found.zero_grad()
    (result.rgb.square().sum() + result.depth.sum() + result.distortion.sum()).backward()
    shown = result.rgb, result.depth, result.opacity
    return [x.detach() for x in shown], [p.grad.clone() for p in found.parameters()], result.samples


@pytest.mark.parametrize("unbounded", [False, True])
def test_training_is_the_path_of_torch(unbounded):
    found, grid = scene(unbounded, blob_scale=2.0)
    (shown, gradients, count), (expected, wanted, reference) = (
        rendered(found, grid, name) for name in ("auto", "reference")
    )
    assert abs(count - reference) <= 2  # at the limit of what is lit, rounding decides
    for a, b in zip(shown, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


def test_samples_are_the_lit_ones_and_seen_those_of_weight():
    found, grid = scene()
    rays_o, rays_d, jitter = rays()
    everything = grid.march(rays_o, rays_d, jitter)
    expected = _lit(found, rays_o, rays_d, everything, 1e-2)
    with torch.no_grad():
        samples, seen, encoded = grid.trace(found.fused(rays_o), rays_o, rays_d, jitter, 1, 1e-2, True)
        sigma = found.density(_points(rays_o, rays_d, samples)[0])[0]
    assert 0 < len(samples.t_starts) < 0.9 * len(everything.t_starts)
    assert all(torch.equal(a, b) for a, b in zip(samples, expected, strict=True))
    torch.testing.assert_close(encoded.sigma, sigma, rtol=1e-3, atol=1e-5)
    weights = rendering.composite(encoded.sigma, torch.zeros(len(sigma), 3), *samples[:2], samples.packed_info).weights
    clear = (weights - 1e-2).abs() > 1e-5
    assert torch.equal(seen[clear], (weights > 1e-2)[clear])


def test_pictures_differ_by_the_light_that_is_left():
    found, grid = scene(config=RenderConfig(steps=96, resolution=32, finer=2))
    cameras = orbit(1, 3.0, 20, 40, 24, 16)
    pictures = []
    for backend in ("auto", "reference"):
        found.config.backend = backend
        pictures.append(render_image(found, background, grid, cameras, 0, grid.config))
    for name in ("rgb", "opacity"):
        a, b = (getattr(picture, name) for picture in pictures)
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4)
    assert pictures[0].samples < pictures[1].samples


def test_nothing_is_lost_without_an_early_stop_and_at_the_most_samples():
    found, grid = scene()
    rays_o, rays_d, _ = rays()
    for most in (1024, 5):
        grid.steps = rendering.Steps(grid.steps.size, 0.0, most)
        everything = grid.march(rays_o, rays_d)
        samples = grid.trace(found.fused(rays_o), rays_o, rays_d, None, 1, 0.0, False).samples
        assert all(torch.equal(a, b) for a, b in zip(samples, everything, strict=True))


def test_no_rays_and_rays_that_miss():
    found, grid = scene()
    for count in (0, 3):
        rays_o, rays_d = torch.full((count, 3), 9.0), torch.tensor([[0.0, 0, 1]]).repeat(count, 1)
        result = render_rays(found, background, grid, rays_o, rays_d, CONFIG)
        assert result.samples == 0
        assert torch.equal(result.rgb, background(rays_d))
        result.rgb.sum().backward()


def test_bytes_do_not_depend_on_the_threads(threads_restored):  # noqa: F811
    found, grid = scene()
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        shown, gradients, _ = rendered(found, grid, "auto")
        results.append(shown + gradients)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
