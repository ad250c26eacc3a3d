"""CSD-Edit of a scene: rounds, what views share, and how the photos are told."""

from dataclasses import replace

import pytest
import torch
from balls import Ball, ball_depths

from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation import SVGDConfig
from csd3d.distillation.edit_loop import CollaborativeEditConfig
from csd3d.editors import csd_edit_scene
from csd3d.editors.csd_edit_scene import CSDEditScene, inner_edit
from csd3d.editors.matches import match_views
from csd3d.editors.scene import SceneEdit, SceneSource
from csd3d.errors import InputError
from csd3d.priors import Defaults, PriorConfig, load_prior


@pytest.fixture(scope="module")
def source(tiny_capture, tiny_prior):
    prior, capture = load_prior(PriorConfig(model=str(tiny_prior))), load_capture(SceneConfig(path=str(tiny_capture)))
    return SceneSource(prior, capture, "paint it red")


def one_round(source, model, step=0, steps=2, svgd=None, **keys):
    """The pictures after a round at `step`, and what the steps reported."""
    inner = replace(inner_edit(), steps=steps, svgd=svgd or SVGDConfig(normalize="row"))
    editor = CSDEditScene(edit_every=5, views=3, edit=inner, **keys)
    edit = SceneEdit(source, model, source.capture.images.clone(), torch.Generator().manual_seed(0))
    reports = []
    editor.update(edit, step, reports.append)
    return edit.images, reports


def test_a_scene_is_rendered_only_for_what_needs_it(source):
    for match, step, times in ((0, 0, 0), (1, 0, 1), (0, 5, 1), (1, 5, 1)):
        ball = Ball()
        one_round(source, ball, step, match=match)
        assert ball.rendered == times


def test_after_each_step_changes_are_pulled_together_where_views_match(source, monkeypatch):
    asked, edit = [], csd_edit_scene.collaborative_edit
    spy = lambda *a, **k: asked.append(k["adjust"]) or edit(*a, **k)  # noqa: E731
    monkeypatch.setattr(csd_edit_scene, "collaborative_edit", spy)
    ball = Ball()
    images, _ = one_round(source, ball, match=0.7, match_above=0.2)
    assert ball.rendered == 1
    assert not torch.equal(images, one_round(source, Ball())[0])
    assert asked[1] is None
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3].sort().values
    cameras, own = source.capture.cameras[source.capture.train[rows]], source.z[rows]
    pairs = torch.tensor([(a, b) for a in range(3) for b in range(3) if a != b])
    matches = match_views(cameras, ball_depths(cameras), pairs, (4, 4), 8)
    z = own + torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(asked[0](z, 0.2), z - 0.7 * matches.loss(z - own)[1])
    assert torch.equal(asked[0](z, 0.19), z)


def test_only_the_rounds_views_are_replaced_and_only_when_one_begins(source):
    images, reports = one_round(source, Ball())
    before = source.capture.images
    changed = [i for i in range(len(images)) if not torch.equal(images[i], before[i])]
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3].sort().values
    assert changed == source.capture.train[rows].tolist()
    assert len(reports) == 2
    for step in (1, 10, 15):  # within a round, and past the last of two
        assert one_round(source, Ball(), step)[1] == []


def test_scales_are_the_priors_unless_given():
    defaults = Defaults(text_scale=4.0, image_scale=1.25)
    assert (CSDEditScene().method(defaults).text_scale, CSDEditScene().method(defaults).image_scale) == (4.0, 1.25)
    given = CSDEditScene(text_scale=0.0, image_scale=1.0, baseline="noise").method(defaults)
    assert (given.text_scale, given.image_scale, given.baseline) == (0.0, 1.0, "noise")


def test_the_official_way_tells_a_scaled_sample_of_the_photos_and_guides_the_baseline(source, monkeypatch):
    images = []
    spy = lambda *a, **k: images.append(a[3]) or a[2]  # noqa: E731
    monkeypatch.setattr(csd_edit_scene, "collaborative_edit", spy)
    one_round(source, Ball(), svgd=SVGDConfig(compat="official"))
    one_round(source, Ball())
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(5, generator=draws)[:3].sort().values
    torch.testing.assert_close(images[0], source.prior.encode(source.photos[rows], draws))
    torch.testing.assert_close(images[1], source.prior.encode_condition(source.photos[rows]))
    official = CSDEditScene(edit=replace(inner_edit(), svgd=SVGDConfig(compat="official")))
    assert official.method(Defaults()).baseline == "guided"
    assert CSDEditScene().method(Defaults()).baseline == "image"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"baseline": "text"}, "baseline is 'text'"),
        ({"edit_every": 0}, "edit_every is 0"),
        ({"text_scale": float("inf")}, "text_scale is inf"),
        ({"edit": CollaborativeEditConfig(perp_neg=True)}, "with csd_edit set it to false"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        CSDEditScene(**keys)


def test_later_rounds_below_the_models_least_noise_are_told_before_any_work(source):
    with pytest.raises(InputError, match=r"editor\.later_t_max: .*0\.001"):
        CSDEditScene(later_t_max=0.001).check(source, "editor")
