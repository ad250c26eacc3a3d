"""The truth about an edit of a capture of the procedural world."""

import pytest
import torch

from csd3d.datasets import SceneConfig, load_capture
from csd3d.evaluation.ground_truth import changed_pixels, load_truth, own_cameras
from csd3d.metrics import psnr


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
