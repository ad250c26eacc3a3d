"""Random cameras stand where the ranges say, and the prompt says what is seen from there."""

import re

import pytest
import torch

from csd3d.cameras import on_sphere, wrap_deg
from csd3d.guidance.views import VIEW_WORDS, PromptConfig, ViewsConfig, away_views, sample_views, tilt, view_of


def draw(count=64, size=20, seed=0, **settings):
    return sample_views(ViewsConfig(**settings), count, size, torch.Generator().manual_seed(seed))


def test_cameras_stand_at_their_angles_and_look_at_the_middle():
    views = draw(target_jitter=0.0, elevation_deg=(-10, 50), distance=(2, 3))
    distance = views.cameras.positions.norm(dim=1)
    assert 2 <= distance.min() < 2.1
    assert 2.9 < distance.max() <= 3
    expected = distance[:, None] * on_sphere(torch.deg2rad(views.azimuth_deg), torch.deg2rad(views.elevation_deg))
    torch.testing.assert_close(views.cameras.positions, expected, rtol=1e-5, atol=1e-5)
    pixel, depth = views.cameras.project(torch.zeros(1, 3), 5)
    torch.testing.assert_close(pixel, torch.full((1, 2), 10.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(depth, distance[5:6])
    assert -10 <= views.elevation_deg.min() < -5
    assert 45 < views.elevation_deg.max() <= 50


def test_azimuths_are_one_a_stratum_and_uniform_within():
    for azimuths in (draw(8, seed=s).azimuth_deg for s in range(20)):
        assert ((azimuths % 360) / 45).long().tolist() == list(range(8))
    free = draw(8, stratified=False).azimuth_deg
    assert ((free % 360) / 45).long().tolist() != list(range(8))
    narrow = draw(500, azimuth_deg=(170, 200)).azimuth_deg
    assert ((narrow >= 170) | (narrow <= -160)).all()


def test_field_of_view_is_the_vertical_one():
    """A point at half the angle above the axis falls on the picture's upper edge."""
    views = draw(4, fov_deg=(40, 40), elevation_deg=(0, 0), target_jitter=0.0)
    distance = views.cameras.positions[2].norm()
    top = torch.tensor([[0.0, 0.0, 1.0]]) * distance * torch.tan(torch.deg2rad(torch.tensor(20.0)))
    assert views.cameras.project(top, 2)[0][0, 1].abs() < 1e-3


def test_jitter_moves_what_it_says_and_no_other_draw():
    still = draw(target_jitter=0.0)
    moved = draw(target_jitter=0.1)
    torch.testing.assert_close(still.cameras.positions, moved.cameras.positions)
    assert not torch.allclose(still.cameras.camera_to_world[:, :, 2], moved.cameras.camera_to_world[:, :, 2], atol=1e-3)
    rolled = draw(target_jitter=0.0, up_jitter=0.2).cameras.camera_to_world
    torch.testing.assert_close(rolled[:, :, 2:], still.cameras.camera_to_world[:, :, 2:])
    assert not torch.allclose(rolled[:, :, 0], still.cameras.camera_to_world[:, :, 0], atol=1e-2)


def test_tilt_keeps_a_rotation():
    poses = tilt(draw().cameras.camera_to_world, torch.linspace(-2, 2, 64))
    rotation = poses[:, :, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(64, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"elevation_deg": (50, 10)}, "lower end first"),
        ({"elevation_deg": (0, 95)}, r"\[-90, 90\]"),
        ({"azimuth_deg": (-180, 181)}, "360"),
        ({"distance": (0, 2)}, "distance"),
        ({"fov_deg": (20, 190)}, "fov_deg"),
    ],
)
def test_ranges_that_contradict_themselves_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ViewsConfig(**settings)


def test_view_words_by_azimuth_and_elevation():
    config = PromptConfig(front_deg=30, back_deg=60)
    found = [view_of(a, 20, config) for a in (0, 30, -31, 119, 121, 180, -180, 330, 360, 725)]
    assert found == ["front", "front", "right", "left", "back", "back", "back", "front", "front", "front"]
    assert view_of(180, 61, config) == "overhead"
    assert config.text("a {view} chair", "back") == "a {view} chair, back view"
    assert wrap_deg(torch.tensor([180.0, -180, 540, 10])).tolist() == [-180, -180, -180, 10]


def test_perp_neg_holds_a_view_away_from_what_it_is_not():
    """A front is held off the side and the back, a back off the side and the front, a side only off the far end."""
    weight = {a: dict(zip(*away_views(a, 10), strict=True)) for a in (0, 45, 89.999, 90, 180, -180, 270)}
    assert weight[0] == {"right": 1.0, "back": 1.0}
    assert weight[180] == weight[-180] == {"right": 1.0, "front": 1.0}
    assert weight[45]["left"] == pytest.approx(0.5)
    assert weight[90]["left"] == weight[270]["right"] == 0
    assert weight[89.999]["left"] == pytest.approx(0, abs=1e-4)
    assert sum(away_views(0, 80)[1]) == 0
    assert sum(away_views(0, 80, overhead_deg=85)[1]) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"template": "a chair"}, "template is 'a chair'"),
        ({"template": "{prompt}, {bogus}"}, "template has {bogus}: only {prompt}, {view}, {backdrop} are filled in"),
        ({"words": {"front": "front"}}, "words lacks back"),
        ({"words": {"overhaed": "top"}}, "words.overhaed: there is no such view; did you mean overhead?"),
        ({"words": VIEW_WORDS | {"overhaed": "top"}}, "words.overhaed: there is no such view; did you mean overhead?"),
        ({"words": VIEW_WORDS | {"front": "of {prompt}"}}, "words.front has {prompt}"),
        ({"front_deg": 100, "back_deg": 90}, "overlap"),
        ({"backdrops": {"grey": (0.5, 0.5, 0.5)}}, "go together"),
        ({"template": "{prompt}, {backdrop}, {view}"}, "go together"),
        ({"template": "{prompt}, {backdrop}, {view}", "backdrops": {"grey": (128.0, 128.0, 128.0)}}, "0, 1"),
    ],
)
def test_prompt_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        PromptConfig(**settings)
