"""Rendering of fields with known pictures; the occupancy grid's update; the distortion loss against its double sum."""

import math

import pytest
import torch
from torch import nn

from csd3d.cameras import Cameras
from csd3d.errors import InputError
from csd3d.rendering import OccupancyGrid, RenderConfig, distortion_loss, render_image, render_rays
from csd3d.rendering.occupancy import ray_box

AABB = torch.tensor([-1.0, -1, -1, 1, 1, 1])
COLOUR = torch.tensor([0.8, 0.3, 0.1])
BEHIND = torch.tensor([0.1, 0.2, 0.9])


class Ball(nn.Module):
    """A ball of constant density and colour: along a chord of length L, opacity is 1 - exp(-sigma L)."""

    def __init__(self, sigma: float = 2.0, radius: float = 0.6, centre=(0.1, 0.0, -0.05)) -> None:
        super().__init__()
        self.sigma, self.radius = nn.Parameter(torch.tensor(sigma)), radius
        self.register_buffer("centre", torch.tensor(centre))
        self.coloured = 0

    def density(self, positions):
        inside = (positions - self.centre).norm(dim=-1) < self.radius
        return self.sigma * inside, positions[:, :0]

    def forward(self, positions, directions):
        self.coloured += len(positions)
        return COLOUR.expand(len(positions), 3), self.density(positions)[0]

    def chord(self, rays_o, rays_d):
        """Length inside the ball, and the distance to its middle."""
        along = ((self.centre - rays_o) * rays_d).sum(1)
        miss = ((self.centre - rays_o) - along[:, None] * rays_d).square().sum(1)
        return 2 * (self.radius**2 - miss).clamp(min=0).sqrt(), along


def background(directions):
    return BEHIND.expand(len(directions), 3)


def rays_towards(count: int, seed: int, distance: float = 2.5):
    generator = torch.Generator().manual_seed(seed)
    rays_o = nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1) * distance
    target = torch.rand(count, 3, generator=generator) * 1.4 - 0.7
    return rays_o, nn.functional.normalize(target - rays_o, dim=1), torch.rand(count, generator=generator)


def updated_grid(config, field, unbounded=False, aabb=AABB, updates=4, seed=0):
    grid = OccupancyGrid(config, aabb, unbounded)
    generator = torch.Generator().manual_seed(seed)
    for k in range(updates):
        grid.update(k * config.update_every, field, generator)
    return grid


@pytest.mark.parametrize("jittered", [False, True])
def test_ball_has_the_opacity_of_its_chords(jittered):
    field, config = Ball(), RenderConfig(steps=3000, resolution=32, max_samples=3000)
    grid = OccupancyGrid(config, AABB)
    rays_o, rays_d, jitter = rays_towards(300, 0)
    result = render_rays(field, background, grid, rays_o, rays_d, config, jitter=jitter if jittered else None)
    length, along = field.chord(rays_o, rays_d)
    opacity = -torch.expm1(-2.0 * length)
    tolerance = {"rtol": 0, "atol": 2 * 2.0 * 3.47 / 3000}  # half a step at either end of a chord
    torch.testing.assert_close(result.opacity, opacity, **tolerance)
    expected = opacity[:, None] * COLOUR + (1 - opacity)[:, None] * BEHIND
    torch.testing.assert_close(result.rgb, expected, **tolerance)
    hit = length > 0.2
    x = 2.0 * length[hit]
    depth = along[hit] - length[hit] / 2 + (1 - (1 + x) * torch.exp(-x)) / 2.0 / opacity[hit]
    torch.testing.assert_close(result.depth[hit], depth, rtol=0, atol=5e-3)
    assert hit.sum() > 100
    assert (length == 0).sum() > 30
    assert torch.equal(result.rgb[length == 0], BEHIND.expand(300, 3)[length == 0])


def test_finer_steps_without_gradient_find_the_depth_of_a_hard_surface():
    field = Ball(sigma=1000.0)
    rays_o, rays_d, _ = rays_towards(300, 4)
    length, along = field.chord(rays_o, rays_d)
    hit = length > 0.2
    errors, samples = {}, {}
    for finer in (1, 4):
        config = RenderConfig(steps=128, finer=finer, resolution=32)
        with torch.no_grad():
            result = render_rays(field, background, OccupancyGrid(config, AABB), rays_o, rays_d, config)
        errors[finer] = (result.depth - (along - length / 2))[hit].abs().max().item()
        samples[finer] = result.samples
    step = AABB.view(2, 3).diff(dim=0).norm().item() / 128  # to the first sample behind the surface
    assert 0.8 * step < errors[1] < step + 1e-3
    assert errors[4] < step / 4 + 1e-3
    assert samples[4] == pytest.approx(4 * samples[1], rel=0.01)
    trained = render_rays(field, background, OccupancyGrid(config, AABB), rays_o, rays_d, config)
    assert trained.samples <= samples[1]  # what is trained keeps its steps, less what no light reaches


def test_the_grid_saves_most_samples_and_loses_none_that_count():
    field, config = Ball(sigma=20.0), RenderConfig(steps=400, resolution=32)
    rays = rays_towards(200, 1)
    full = render_rays(field, background, OccupancyGrid(config, AABB), *rays[:2], config)
    sparse = render_rays(field, background, updated_grid(config, field, updates=16), *rays[:2], config)
    error = (sparse.rgb - full.rgb).abs()
    assert error.max() < 0.05  # a cell that the ball only grazes may be missed
    assert error.mean() < 2e-4
    assert sparse.samples < 0.5 * full.samples


def test_gradient_of_density_is_that_of_the_closed_form():
    field, config = Ball(), RenderConfig(steps=3000, resolution=16, max_samples=3000)
    rays_o, rays_d, jitter = rays_towards(200, 2)
    result = render_rays(field, background, OccupancyGrid(config, AABB), rays_o, rays_d, config, jitter=jitter)
    result.rgb.sum().backward()
    length, _ = field.chord(rays_o, rays_d)
    expected = ((COLOUR - BEHIND).sum() * length * torch.exp(-2.0 * length)).sum()
    torch.testing.assert_close(field.sigma.grad, expected, rtol=5e-3, atol=1e-3)


def test_without_gradient_only_visible_colours_are_evaluated():
    field, config = Ball(sigma=200.0), RenderConfig(steps=300, resolution=32, early_stop=0.0)
    grid = updated_grid(config, field)
    rays = rays_towards(100, 3)[:2]
    slow = render_rays(field, background, grid, *rays, config)
    everything, field.coloured = field.coloured, 0
    with torch.no_grad():
        fast = render_rays(field, background, grid, *rays, RenderConfig(steps=300, resolution=32))
    torch.testing.assert_close(fast.rgb, slow.rgb.detach(), rtol=0, atol=1e-3)
    torch.testing.assert_close(fast.opacity, slow.opacity.detach(), rtol=0, atol=1e-6)
    assert everything == slow.samples == fast.samples
    assert 0 < field.coloured < 0.3 * everything


def test_samples_that_no_light_reaches_are_not_trained_on():
    field, rays = Ball(sigma=60.0), rays_towards(100, 3)
    results = []
    for config in (RenderConfig(early_stop=0.0), RenderConfig(early_stop=1e-4)):
        result = render_rays(field, background, OccupancyGrid(config, AABB), *rays[:2], config, jitter=rays[2])
        (gradient,) = torch.autograd.grad(result.depth.sum(), field.sigma)
        results.append((result, gradient))
    (whole, a), (cut, b) = results
    torch.testing.assert_close(cut.rgb, whole.rgb, rtol=0, atol=2e-4)
    torch.testing.assert_close(b, a, rtol=0.02, atol=0)
    assert 0 < cut.samples < 0.8 * whole.samples


def test_near_plane_and_rays_that_miss():
    field, config = Ball(sigma=500.0), RenderConfig(near=3.0)
    rays_o = torch.tensor([[0.1, 0.0, 2.5], [0.1, 0.0, 4.0], [3.0, 3, 3]])
    rays_d = torch.tensor([[0.0, 0, -1]] * 3)
    result = render_rays(field, background, OccupancyGrid(config, AABB), rays_o, rays_d, config)
    torch.testing.assert_close(result.depth, torch.tensor([3.0, 3.45, 0.0]), rtol=0, atol=0.02)
    assert torch.equal(result.rgb[2], BEHIND)
    nothing = render_rays(field, background, OccupancyGrid(config, AABB), rays_o[2:], rays_d[2:], config)
    assert nothing.samples == 0
    nothing.rgb.sum().backward()  # no sample, no error, no gradient
    assert field.sigma.grad is None or field.sigma.grad == 0
    empty = render_rays(field, background, OccupancyGrid(config, AABB), rays_o[:0], rays_d[:0], config)
    assert [tuple(x.shape) for x in (empty.rgb, empty.depth, empty.opacity)] == [(0, 3), (0,), (0,)]


def test_unbounded_scenes_see_far_things_with_growing_steps():
    field = Ball(sigma=50.0, radius=1.5, centre=(9.0, 0, 0))
    config = RenderConfig(resolution=32, levels=5, cone_angle=0.004)
    grid = updated_grid(config, field, unbounded=True)
    rays_o, rays_d = torch.tensor([[0.0, 0, 0], [0, 0, 0]]), torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    result = render_rays(field, background, grid, rays_o, rays_d, config)
    torch.testing.assert_close(result.depth, torch.tensor([7.5, 0.0]), rtol=0, atol=0.1)
    samples = grid.march(rays_o, rays_d)
    dt = samples.t_ends - samples.t_starts
    torch.testing.assert_close(dt, 0.004 * samples.t_starts, rtol=1e-3, atol=0)
    assert samples.t_starts.min() > 6
    bounded = render_rays(field, background, OccupancyGrid(config, AABB), rays_o, rays_d, config)
    assert bounded.opacity.max() == 0


def test_image_rows_are_the_cameras_rays():
    pose = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2.5]]])
    focal, centre = torch.tensor([12.0]), torch.tensor([4.5])
    cameras = Cameras(pose, focal, focal, centre, torch.tensor([3.5]), width=9, height=7)
    field, config = Ball(), RenderConfig()
    grid = OccupancyGrid(config, AABB)
    image = render_image(field, background, grid, cameras, 0, config, chunk=10)
    assert image.rgb.shape == (7, 9, 3)
    with torch.no_grad():
        rays = render_rays(field, background, grid, *cameras.image_rays(0), config)
    for name in ("rgb", "depth", "opacity"):
        assert torch.equal(getattr(image, name).flatten(0, 1), getattr(rays, name))
    assert image.samples == rays.samples
    assert not image.rgb.requires_grad
    assert image.opacity[3, 4] > 0.8
    assert image.opacity[0, 0] == 0


def test_many_samples_go_through_the_field_in_parts(monkeypatch):
    field, config, most = Ball(), RenderConfig(steps=64, resolution=16), []
    grid, (rays_o, rays_d, _) = OccupancyGrid(config, AABB), rays_towards(40, 1)

    class Counted(Ball):
        def density(self, positions):
            most.append(len(positions))
            return super().density(positions)

    with torch.no_grad():
        whole = render_rays(field, background, grid, rays_o, rays_d, config)
        monkeypatch.setattr("csd3d.rendering.render.AT_ONCE", 50)
        parts = render_rays(Counted(), background, grid, rays_o, rays_d, config)
    assert whole.samples > 500
    assert max(most) == 50
    for name in ("rgb", "depth", "opacity"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_ray_box():
    rays_o = torch.tensor([[-3.0, 0, 0], [0, 0, 0], [-3, 2, 0], [0, 0.5, 3]])
    rays_d = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, -1]])
    near, far = ray_box(rays_o, rays_d, AABB)
    torch.testing.assert_close(near[[0, 1, 3]], torch.tensor([2.0, -1, 2]))
    torch.testing.assert_close(far[[0, 1, 3]], torch.tensor([4.0, 1, 4]))
    assert near[2] > far[2]


# ---- occupancy grid


def test_update_finds_the_ball():
    config = RenderConfig(resolution=32)
    grid = updated_grid(config, Ball(sigma=20.0, centre=(0.0, 0, 0)))
    centres = (torch.arange(32) + 0.5) / 16 - 1
    distance = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    cells = grid.grid.occupancy[0]
    diagonal = math.sqrt(3) / 16
    assert cells[distance < 0.6 - diagonal / 2].all()
    assert not cells[distance > 0.6 + diagonal / 2].any()


def test_what_is_gone_is_forgotten_and_what_appears_is_found():
    config = RenderConfig(resolution=16, warmup=1, decay=0.5)
    grid = updated_grid(config, Ball(sigma=20.0, centre=(0.5, 0, 0), radius=0.3))
    moved = Ball(sigma=20.0, centre=(-0.5, 0, 0), radius=0.3)
    generator = torch.Generator().manual_seed(1)
    for k in range(1, 120):
        grid.update(k * config.update_every, moved, generator)
    cells = grid.grid.occupancy[0]
    assert not cells[9:].any()
    assert cells[4, 8, 8]
    assert cells[3, 7, 8]


def test_updates_are_the_generators_alone_and_resume_exactly():
    config = RenderConfig(resolution=16, warmup=20, levels=2)
    torch.manual_seed(0)
    whole = updated_grid(config, Ball(), unbounded=True, updates=6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    first = OccupancyGrid(config, AABB, unbounded=True)
    for step in range(48):
        first.update(step, Ball(), generator)
    assert torch.equal(torch.get_rng_state(), before)
    second = OccupancyGrid(config, AABB, unbounded=True)
    second.march(*rays_towards(3, 0)[:2])  # a march must not leave the old grid behind
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    for step in range(48, 96):
        second.update(step, Ball(), resumed)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )
    rays = rays_towards(50, 4)[:2]
    assert all(torch.equal(a, b) for a, b in zip(whole.march(*rays), second.march(*rays), strict=True))
    other = updated_grid(config, Ball(), unbounded=True, updates=6, seed=3)
    assert not torch.equal(other.estimator.occs, whole.estimator.occs)


def test_loaded_cells_are_marched():
    config = RenderConfig(resolution=16)
    rays = rays_towards(20, 5)[:2]
    empty, full = OccupancyGrid(config, AABB), OccupancyGrid(config, AABB)
    empty.estimator.binaries.fill_(False)
    before = {key: value.clone() for key, value in empty.state_dict().items()}
    assert len(empty.march(*rays).t_starts) == 0
    empty.load_state_dict(full.state_dict())
    assert len(empty.march(*rays).t_starts) == len(full.march(*rays).t_starts) > 0
    empty.load_state_dict(before)
    assert len(empty.march(*rays).t_starts) == 0


def test_a_uniform_field_stays_occupied():
    """Exact in binary, so that the mean of all cells is each cell: steps of 3 / 384 = 2^-7, thickness 2^-10."""
    field, aabb = Ball(sigma=0.125, radius=10.0), torch.tensor([0.0, 0, 0, 2, 2, 1])
    grid = updated_grid(RenderConfig(resolution=16, steps=384), field, aabb=aabb)
    assert (grid.estimator.occs == 2**-10).all()
    assert grid.grid.occupancy.all()


def test_later_updates_visit_a_quarter_of_the_cells():
    class Counting(Ball):
        seen = 0

        def density(self, positions):
            self.seen += len(positions)
            return super().density(positions)

    config, field = RenderConfig(resolution=16, warmup=16), Counting(radius=9.0)
    grid = OccupancyGrid(config, AABB)
    generator = torch.Generator().manual_seed(0)
    grid.update(0, field, generator)
    assert field.seen == 16**3
    grid.update(5, field, generator)
    assert field.seen == 16**3
    grid.update(16, field, generator)
    assert 16**3 * 1.15 < field.seen <= 16**3 * 1.25
    (cells,) = grid.estimator._sample_uniform_and_occupied_cells(16**3 // 4)
    assert len(cells.unique()) == len(cells)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 0), ("near", -1.0), ("decay", 1.0), ("resolution", 40), ("backend", "fast")]
)
def test_config_names_the_bad_key(key, value):
    with pytest.raises(InputError, match=rf"render\.{key}: .*{value}"):
        RenderConfig(**{key: value})


# ---- distortion


def distortion_by_double_sum(weights, starts, ends, packed):
    result = []
    for first, count in packed.tolist():
        w, m = weights[first : first + count], (starts + ends)[first : first + count] / 2
        size = (ends - starts)[first : first + count]
        result.append((w[:, None] * w * (m[:, None] - m).abs()).sum() + (w**2 * size).sum() / 3)
    return torch.stack(result)


def distortion_inputs():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 1, 40, 0])
    packed = torch.stack([counts.cumsum(0) - counts, counts], 1)
    weights = torch.rand(44, generator=generator, dtype=torch.float64)
    edges = torch.rand(89, generator=generator, dtype=torch.float64).cumsum(0)
    return weights, edges[0:88:2], edges[1:88:2], packed


def test_distortion_is_its_double_sum():
    inputs = distortion_inputs()
    torch.testing.assert_close(distortion_loss(*inputs), distortion_by_double_sum(*inputs), rtol=1e-10, atol=1e-12)
    weights, *rest = inputs
    assert torch.autograd.gradcheck(lambda w: distortion_loss(w, *rest), weights.requires_grad_())


def test_rendered_distortion_prefers_one_surface_to_two():
    """A thin, a thick and a split medium of equal opacity, s = t over the diagonal; the gradient reaches the field."""
    config = RenderConfig(steps=1000)
    rays_o, rays_d = torch.tensor([[0.1, 0.0, 2.5]]), torch.tensor([[0.0, 0, -1]])

    def distortion(radius):
        field = Ball(sigma=1.5 / radius, radius=radius)
        scene = (field, background, OccupancyGrid(config, AABB))
        value = render_rays(*scene, rays_o, rays_d, config, distortion=True).distortion
        return value, torch.autograd.grad(value.sum(), field.sigma)[0]

    (thin, _), (thick, gradient) = distortion(0.1), distortion(0.6)
    torch.testing.assert_close(thick / thin, torch.tensor([6.0]), rtol=0.05, atol=0)
    assert gradient != 0
    # closed form, sigma L = x = 3: L / diagonal * (2 / x) (1 - 2 x e^-x - e^-2x) / 2
    x, length = 3.0, 1.2 / (2 * math.sqrt(3))
    expected = length / x * (1 - 2 * x * math.exp(-x) - math.exp(-2 * x))
    torch.testing.assert_close(thick, torch.tensor([expected]), rtol=0.02, atol=0)
