"""The hash-grid NeRF as a representation."""

import copy

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.fields import FieldConfig
from csd3d.rendering import RenderConfig
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.representations.hashgrid import FIRST_GUESS, HashGrid, draw_rays, ray_count

SMALL = HashGrid(
    FieldConfig(levels=4, log2_hashmap_size=10, max_resolution=32, hidden=16),
    RenderConfig(steps=48, resolution=16, warmup=8, update_every=4),
)
BOX = torch.tensor([-1.0, -1, -1, 1, 1, 1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scene():
    return SMALL.open(BOX, generator())


def pictures(count=3):
    cameras = orbit(count, 3.0, 20, 40, 8, 6)
    return Pictures(torch.full((count, 6, 8, 3), 0.25), cameras, None, torch.arange(count))


def test_draw_rays_puts_patches_first_row_major_and_stays_inside():
    cameras = orbit(5, 2.0, 20, 40, 10, 8)
    pictures = Pictures(torch.rand(5, 8, 10, 3), cameras, None, torch.tensor([1, 3]))
    config = FitConfig(patches=2, patch_size=3, rays=50)
    views, pixels = draw_rays(pictures, config, 50, torch.Generator().manual_seed(0))
    assert set(views.tolist()) == {1, 3}
    assert len(views) == len(pixels) == 2 * 9 + 50
    assert pixels.min() >= 0
    assert (pixels < torch.tensor([10, 8])).all()
    first = pixels[:9] - pixels[0]
    assert first.tolist() == [[c, r] for r in range(3) for c in range(3)]
    assert len(views[:9].unique()) == 1


def test_ray_count_keeps_the_samples_of_a_step():
    config = FitConfig(samples=10_000, rays=4000)
    assert ray_count(config, 100.0) == 100
    assert ray_count(config, 0.5) == 4000
    assert ray_count(config, 1e9) == 64


def test_views_with_a_graph_are_those_without_and_carry_gradients(scene):
    cameras = orbit(2, 3.0, 20, 40, 8, 6)
    shown = scene.render(cameras)
    plain = scene.render_views(cameras, torch.arange(2))
    assert shown.rgb.shape == plain.rgb.shape == (2, 6, 8, 3)
    torch.testing.assert_close(shown.rgb, plain.rgb, atol=1e-3, rtol=0)
    torch.testing.assert_close(shown.opacity, plain.opacity, atol=1e-3, rtol=0)
    shown.rgb.sum().backward()
    assert scene.field.table.grad.abs().max() > 0


def test_views_are_their_rays_jitter_and_all(scene):
    cameras, jitter = orbit(2, 3.0, 20, 40, 8, 6), torch.rand(2, 6, 8, generator=generator())
    shown = scene.render(cameras, jitter, distortion=True)
    alone = scene.render_rays(*cameras.image_rays(1), jitter[1].flatten(), distortion=True)
    torch.testing.assert_close(shown.rgb[1].flatten(0, 1), alone.rgb)
    torch.testing.assert_close(shown.distortion[1].flatten(), alone.distortion)


def test_every_parameter_is_in_one_group(scene):
    groups = scene.parameter_groups()
    assert sorted(map(id, scene.parameters())) == sorted(id(p) for group in groups.values() for p in group)
    assert not SMALL.open(BOX, generator(), background="white").parameter_groups()["background"]


def test_a_fit_goes_on_from_its_state_as_if_unbroken(scene):
    config = FitConfig(steps=6, rays=64, samples=2048)

    def steps(model, optimiser, first, last, draws):
        return [model.fit_step(optimiser, pictures(), config, step, draws) for step in range(first, last)]

    draws, optimiser = generator(1), scene.start_fit(config)
    steps(scene, optimiser, 0, 3, draws)
    other, later = SMALL.open(BOX, generator(5)), generator()
    resumed = other.start_fit(config)
    other.load_state_dict(copy.deepcopy(scene.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    later.set_state(draws.get_state())
    assert other.samples_per_ray == scene.samples_per_ray != FIRST_GUESS
    assert steps(scene, optimiser, 3, 6, draws) == steps(other, resumed, 3, 6, later)
    other.start_fit(config)
    assert other.samples_per_ray == FIRST_GUESS


def test_a_checkpoint_knows_the_levels_in_use():
    scene, other = SMALL.open(BOX, generator()), SMALL.open(BOX, generator())
    scene.set_levels(1)
    other.load_state_dict(scene.state_dict())
    points = torch.rand(9, 3, generator=generator())
    assert torch.equal(other.field.density(points)[0], scene.field.density(points)[0])
    other.set_levels(2)
    assert not torch.equal(other.field.density(points)[0], scene.field.density(points)[0])


@pytest.mark.parametrize("levels", [-1, 0, 5, 10**30, 1.5, None])
def test_levels_that_the_grid_does_not_have_are_refused(scene, levels):
    """The kernels would read outside of the grid: −1 ended the process."""
    state = scene.state_dict()
    state["_extra_state"] = {**state["_extra_state"], "active_levels": levels}
    with pytest.raises(ValueError, match=r"^active_levels: is .*, expected a whole number from 1 to 4"):
        scene.load_state_dict(state)
