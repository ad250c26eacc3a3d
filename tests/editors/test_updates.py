"""What an updater does to a picture, apart from the editing itself."""

from dataclasses import replace

import pytest
import torch

from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation import SVGDConfig
from csd3d.editors import updates
from csd3d.editors.updates import KEPT_BELOW, CSDEditConfig, UpdateConfig, ViewEditor, restore_detail, update_csd_edit
from csd3d.priors import PriorConfig, load_prior
from csd3d.rendering import Rendered
from csd3d.representations.reprojection import view_correspondence


def pictures(seed, count=2, size=24):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def test_an_edit_that_does_nothing_returns_its_source_exactly():
    source, roundtrip = pictures(0), pictures(1)
    torch.testing.assert_close(restore_detail(roundtrip, roundtrip, source), source, rtol=0, atol=1e-6)


def test_detail_returns_in_proportion_to_how_little_changed():
    source, roundtrip = 0.4 + 0.2 * pictures(0), 0.4 + 0.2 * pictures(1)
    for share in (0.0, 0.25, 0.75):
        edited = roundtrip + share * KEPT_BELOW
        expected = edited + (1 - share) * (source - roundtrip)
        torch.testing.assert_close(restore_detail(edited, roundtrip, source), expected)
    edited = roundtrip + 2 * KEPT_BELOW
    torch.testing.assert_close(restore_detail(edited, roundtrip, source), edited)


def test_an_edit_of_one_half_leaves_the_other_as_it_was():
    source, roundtrip = pictures(0), pictures(1)
    edited = roundtrip.clone()
    edited[:, :, :12] = 0
    kept = restore_detail(edited, roundtrip, source)
    torch.testing.assert_close(kept[:, :, 16:], source[:, :, 16:], rtol=0, atol=1e-6)
    torch.testing.assert_close(kept[:, :, :8], edited[:, :, :8])


class Ball:
    """A scene that is a ball about the origin, more or less opaque."""

    def __init__(self, opacity=1.0):
        self.opacity, self.rendered = opacity, 0

    def render_views(self, cameras, indices):
        self.rendered += 1
        depth = ball_depths(cameras[indices])
        views = self.opacity * depth.isfinite().float()
        return Rendered(torch.full((*depth.shape, 3), 0.5), torch.where(views > 0, depth, 9.0), views, 0)


def ball_depths(cameras):
    squared = cameras.positions.square().sum(1).mean() / 9  # of its radius
    rays = (cameras.image_rays(i) for i in range(len(cameras)))
    along = [(-(o * d).sum(-1), (o * d).sum(-1).square() - o.square().sum(-1) + squared) for o, d in rays]
    found = [torch.where(rest > 0, middle - rest.clamp_min(0).sqrt(), torch.inf) for middle, rest in along]
    return torch.stack(found).reshape(-1, cameras.height, cameras.width)


@pytest.fixture(scope="module")
def editor(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return ViewEditor(prior, capture, "paint it red")


def one_round(editor, model, correspondence, step=0):
    """The pictures after a round at `step`, and what the steps reported."""
    inner = replace(CSDEditConfig().edit, steps=2, svgd=SVGDConfig(normalize="row"))
    config = UpdateConfig(csd_edit=CSDEditConfig(edit_every=5, views=3, edit=inner, correspondence=correspondence))
    images, reports = editor.capture.images.clone(), []
    update_csd_edit(editor, model, images, step, config, torch.Generator().manual_seed(0), reports.append)
    return images, reports


def test_views_share_along_the_surface_when_asked(editor, monkeypatch):
    asked, edit = [], updates.collaborative_edit
    monkeypatch.setattr(updates, "collaborative_edit", lambda *a, **k: asked.append(k["correspond"]) or edit(*a, **k))
    images, reports = one_round(editor, Ball(), "depth")
    assert all(0 < report["shared_pixels"] < 1 for report in reports)
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3].sort().values
    cameras = editor.capture.cameras[editor.capture.train[rows]]
    expected, found = view_correspondence(cameras, ball_depths(cameras), (4, 4), 8), asked[0](torch.arange(3))
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.validity, expected.validity)
    plain, _ = one_round(editor, Ball(), "none")
    assert not torch.equal(images, plain)
    assert asked[1] is None


def test_what_has_no_surface_is_not_shared(editor):
    _, reports = one_round(editor, Ball(opacity=0.4), "depth")
    assert all(report["shared_pixels"] == 0 for report in reports)


def test_a_scene_is_rendered_only_for_what_needs_it(editor):
    for correspondence, step, times in (("none", 0, 0), ("depth", 0, 1), ("none", 5, 1), ("depth", 5, 1)):
        ball = Ball()
        one_round(editor, ball, correspondence, step)
        assert ball.rendered == times


def test_unknown_correspondences_are_refused():
    with pytest.raises(ValueError, match="correspondence is 'flow': choose none or depth"):
        CSDEditConfig(correspondence="flow")
