"""One picture as the front view: its camera is that of the views, and its errors reach the field."""

from types import SimpleNamespace

import pytest
import torch

from csd3d import registry
from csd3d.fields import FieldConfig
from csd3d.guidance.assets import asset_step, new_phase
from csd3d.guidance.front import FrontConfig, FrontView
from csd3d.guidance.views import ViewsConfig, sample_views
from csd3d.rendering import RenderConfig
from csd3d.representations.batch import AssetConfig, Assets
from csd3d.representations.descent import OptimConfig, asset_optimiser
from csd3d.representations.fit import descend
from csd3d.schema import choose
from csd3d.tasks.text_to_3d import TextTo3DConfig

FIELD = {"levels": 4, "log2_hashmap_size": 10, "max_resolution": 32, "hidden": 16, "sh_degree": 1, "blob_scale": 8.0}
RENDER = {"steps": 48, "resolution": 16, "warmup": 8, "update_every": 4}
BLACK = torch.zeros(3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assets(count=1):
    grid = choose("representation", "hashgrid", field=FieldConfig(**FIELD), render=RenderConfig(**RENDER))
    return Assets(AssetConfig(representation=grid, levels=[(0, 4)]), count, generator())


def splats():
    made_of = choose("representation", "splats", count=64)
    return Assets(AssetConfig(representation=made_of), 1, generator(), (0.5, 0.5, 0.5))


def square(side=16, **settings):
    """A red square of half the side, in the middle."""
    config = FrontConfig(size=side, **settings)
    mask = torch.zeros(side, side)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = 1
    colour = mask * torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return FrontView(config.camera(ViewsConfig()), colour, mask, config)


def test_its_camera_is_that_of_a_view_at_the_same_place():
    place = {"azimuth_deg": (30, 30), "elevation_deg": (20, 20), "distance": (3.9, 3.9), "fov_deg": (40, 40)}
    views = sample_views(ViewsConfig(**place, target_jitter=0.0), 1, 64, generator())
    camera = FrontConfig(azimuth_deg=30, elevation_deg=20, size=64).camera(ViewsConfig(**place))
    for own, wanted in ((camera, views.cameras), (camera.resized(24, 24), views.cameras.resized(24, 24))):
        torch.testing.assert_close(own.camera_to_world, wanted.camera_to_world, rtol=0, atol=1e-5)
        torch.testing.assert_close(own.fx, wanted.fx)
        torch.testing.assert_close(own.cx, wanted.cx)
    own = FrontConfig(azimuth_deg=-360, distance=3.0, fov_deg=50).camera(ViewsConfig())
    assert own.positions.norm().item() == pytest.approx(3.0)
    assert own.positions[0, 0] > 2.8  # the front looks along +x
    assert own.positions[0, 1].abs() < 1e-4


def test_left_in_the_picture_is_left_in_a_view():
    """What the picture shows at the left, the world shows at the left: the demo's mug has its handle at the right."""
    camera = FrontConfig(size=32).camera(ViewsConfig())
    _, mask = registry.get("demo", "object").thing("a blue mug", 5, camera)
    columns = mask.sum(0).nonzero()[:, 0]
    assert columns.max() - 15.5 > 15.5 - columns.min() + 3


def test_the_target_stands_before_the_colour_in_every_size():
    view = square()
    for side in (8, 16, 32):
        picture, mask = view.target(torch.tensor([0.0, 1.0, 0.0]), side)
        assert picture[:, 0, 0].tolist() == [0, 1, 0]
        torch.testing.assert_close(picture[:, side // 2, side // 2], torch.tensor([0.9, 0.1, 0.1]))
        assert mask.mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_error_is_the_weighted_squares_and_its_gradient_reaches_the_field():
    view, model = square(colour_weight=2.0, mask_weight=3.0), assets(2)
    loss, report = view.loss(model, 16, BLACK, generator())
    assert loss.item() == pytest.approx(2 * report["front_colour"] + 3 * report["front_mask"], rel=1e-5)
    loss.backward()
    for scene in model.models:
        assert scene.field.table.grad.abs().max() > 0
    with torch.no_grad():
        seen = view.shown(model, BLACK)[1]
    assert report["front_mask"] == pytest.approx((seen - view.mask).square().mean().item(), rel=0.2)  # other samples


@pytest.mark.parametrize("made", [assets, splats])
def test_descending_it_makes_the_picture(made):
    view, model = square(), made()
    optimiser = asset_optimiser(model, OptimConfig(learning_rate=0.02))
    before = view.figures(model, BLACK)
    for step in range(40):
        model.prepare(step, 4, generator(step))
        colour = torch.rand(3, generator=generator(step))
        assert descend(model, optimiser, view.loss(model, 16, colour, generator(step))[0], 1.0)
    after = view.figures(model, BLACK)
    assert after["front_psnr"] > before["front_psnr"] + 5
    assert after["front_iou"] > max(0.8, before["front_iou"])


class NoScore:
    """A guide that wants nothing, so that the picture alone moves the field."""

    prior = SimpleNamespace(unet_evaluations=0)

    def encode(self, images):
        return images

    def loss(self, z, images, step, generator, **context):
        return (z * 0).sum(), {"t": 0.0}


def test_a_step_adds_it_to_the_score():
    grid = choose("representation", "hashgrid", field=FieldConfig(**FIELD), render=RenderConfig(**RENDER))
    asset = AssetConfig(representation=grid, resolution=[(0, 12)], levels=[(0, 4)])
    config = TextTo3DConfig(prompt="a red chair", asset=asset, guidance_size=16)
    job = SimpleNamespace(config=config, device=torch.device("cpu"), generator=lambda purpose: generator())
    moved = {}
    for front in (None, square()):
        phase = new_phase(job, "sds")
        before = phase.model.models[0].field.table.clone()
        report = asset_step(config, phase, NoScore(), 0, None, front)
        assert ("front_colour" in report) == ("front_mask" in report) == (front is not None)
        moved[front is not None] = (phase.model.models[0].field.table - before).abs().max().item()
    assert moved[False] == 0
    assert moved[True] > 0
