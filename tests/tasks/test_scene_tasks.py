"""The parts of scene editing that have closed forms."""

import math

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.evaluation.ground_truth import changed_pixels, load_truth, own_cameras
from csd3d.metrics import psnr
from csd3d.rendering import Rendered
from csd3d.report.camera_path import looked_at, path_azimuths, video_cameras
from csd3d.representations.hashgrid import FitConfig, Pictures, draw_rays, fit_loss, learning_rate, ray_count


@pytest.fixture(scope="module")
def capture(tiny_capture):
    return load_capture(SceneConfig(path=str(tiny_capture)))


def test_truth_of_the_source_is_the_capture_itself(capture):
    """Poses, scale and intrinsics: rendering the source scene through the capture's cameras gives it back."""
    truth = load_truth(capture, "paint it a bright colour")
    views = truth.views(truth.source, capture.train)
    assert psnr(views.rgb, capture.images[capture.train]).min() > 45


def test_true_depth_is_in_the_captures_normalised_frame(capture):
    """Surface points from the true depth of one view land on the object's box in the capture's own frame."""
    truth = load_truth(capture, "make it blue")
    index = int(capture.train[0])
    views = truth.views(truth.source, torch.tensor([index]))
    rays_o, rays_d = capture.cameras.image_rays(index)
    hit = (views.mask[0] == 1).flatten()
    points = capture.map_back(rays_o[hit] + rays_d[hit] * views.depth[0].flatten()[hit, None])
    assert points[:, 2].max() == pytest.approx(0.36, abs=0.03)  # the cube's top
    assert points[:, 2].min() > -0.82  # the floor
    assert points[:, :2].norm(dim=1).max() < 0.58 * 2**0.5 + 0.01


def test_ambiguous_words_have_several_answers_and_unknown_words_none(capture):
    assert len(load_truth(capture, "paint it a bright colour").answers) == 3
    assert load_truth(capture, "make it sing") is None


def test_changed_pixels_are_the_object_when_it_is_recoloured(capture):
    truth = load_truth(capture, "make it blue")
    before, after = (truth.views(scene, capture.test) for scene in (truth.source, truth.answers[0]))
    changed = changed_pixels(before.rgb, after.rgb)
    assert changed[before.mask == 1].float().mean() > 0.95
    assert changed[before.mask == 0].float().mean() < 0.02


def test_own_cameras_undo_the_normalisation(capture):
    own = own_cameras(capture, capture.cameras)
    assert own.positions.norm(dim=1).sub(4).abs().max() < 1e-4  # the world's cameras stand 4 from the origin


def test_looked_at_is_where_the_axes_meet():
    cameras = orbit(7, 2.0, 20, 40, 8, 8, target=(0.3, -0.2, 0.5))
    assert torch.allclose(looked_at(cameras), torch.tensor([0.3, -0.2, 0.5]), atol=1e-4)


def test_path_goes_round_what_was_seen_from_all_sides_and_swings_where_it_was_not():
    round_trip = path_azimuths(torch.linspace(0, 2 * math.pi, 13)[:-1], 8)
    assert torch.allclose(round_trip.diff(), torch.full((7,), math.pi / 4))
    seen = torch.linspace(2.9, 3.9, 9)  # across the ±π seam
    swing = path_azimuths(torch.atan2(seen.sin(), seen.cos()), 40) % (2 * math.pi)
    assert swing.min() > 2.9
    assert swing.max() < 3.9
    assert swing.max() - swing.min() > 0.6


def test_video_cameras_keep_distance_and_elevation(capture):
    cameras = video_cameras(capture, 12)
    distance = (cameras.positions - looked_at(capture.cameras[capture.train])).norm(dim=1)
    assert distance.std() < 1e-4
    assert len(cameras) == 12


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


def test_learning_rate_warms_up_and_falls():
    config = FitConfig(learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1, abs=0.01)
    assert learning_rate(config, 50, 100) == pytest.approx(0.55)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)


def test_fit_loss_is_the_weighted_sum_over_usable_rays():
    rgb, target = torch.tensor([[0.5] * 3, [0.9] * 3, [0.0] * 3]), torch.tensor([[0.6] * 3, [0.9] * 3, [1.0] * 3])
    rendered = Rendered(rgb, None, torch.full((3,), 0.5), 0, distortion=torch.tensor([0.2, 0.4, 0.6]))
    config = FitConfig(opacity_weight=0.1, distortion_weight=0.01)
    loss, report = fit_loss(rendered, target, torch.tensor([True, True, False]), config, None)
    colour = (0.1 - 0.05 / 2) / 2  # smooth L1 past its quadratic part; the second ray is exact, the third unusable
    assert report["colour"] == pytest.approx(colour, rel=1e-5)
    assert loss.item() == pytest.approx(colour + 0.1 * math.log(2) + 0.01 * 0.4, rel=1e-5)
