"""The pattern that is found: softer it counts less, and blotches of its colours do not count."""

from dataclasses import replace

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.metrics.surface import blurred, pattern_found
from csd3d.world.objects import WorldObjects
from csd3d.world.scene import Scene

CAMERAS, GREY = orbit(2, 4.0, 30.0, 31.0, 96, 96), torch.tensor([0.62, 0.62, 0.63])


@pytest.fixture(scope="module", params=["stripes", "checks", "dots"])
def mug(request):
    objects = WorldObjects(f"a green mug with white {request.param}")
    scene = Scene("mug", "green", request.param, "white", plate=False)
    plain = replace(scene, pattern="plain")
    true, first, second = (objects.views(one, CAMERAS, GREY) for one in (scene, plain, replace(plain, colour="white")))
    return true, first.rgb, second.rgb


def found(mug, rgb, opaque=None):
    true, *_ = mug
    return pattern_found(rgb, true.mask > 0.5 if opaque is None else opaque, true.rgb, true.asked)


def soft(rgb, sigma):
    return torch.stack([blurred(rgb[..., k], sigma) for k in range(3)], -1)


def test_a_pattern_counts_by_its_contrast(mug):
    true, first, second = mug
    assert found(mug, true.rgb) == pytest.approx(1, abs=0.01)
    assert found(mug, true.rgb * 0.8) > 0.8  # darker
    assert found(mug, true.rgb / 2 + (first + second) / 4) == pytest.approx(0.5, abs=0.08)
    assert found(mug, soft(true.rgb, 0.01)) > 0.8 > 0.5 > found(mug, soft(true.rgb, 0.03)) > 0.4
    assert found(mug, torch.roll(true.rgb, 1, 1)) > 0.8  # a hundredth of the picture lower


def test_one_colour_a_mixture_halves_speckle_and_blotches_are_no_pattern(mug):
    true, first, second = mug
    noise = torch.randn(first.shape[:3], generator=torch.Generator().manual_seed(0))
    halves = torch.cat((first[:, :48], second[:, 48:]), 1)
    blotches = [torch.where((blurred(noise, sigma) > 0)[..., None], first, second) for sigma in (0.002, 0.03)]
    for rgb in (first, second, (first + second) / 2, halves, *blotches, soft(true.rgb, 0.06)):
        assert found(mug, rgb) < 0.2


def test_another_pattern_and_swapped_colours_are_not_the_pattern():
    objects, scene = WorldObjects("a green mug with white dots"), Scene("mug", "green", "dots", "white", plate=False)
    true = objects.views(scene, CAMERAS, GREY)
    others = ({"pattern": "stripes"}, {"pattern": "checks"}, {"colour": "white", "pattern_colour": "green"})
    for other in others:
        rgb = objects.views(replace(scene, **other), CAMERAS, GREY).rgb
        assert pattern_found(rgb, true.mask > 0.5, true.rgb, true.asked) < 0.1


def test_what_is_not_there_has_no_pattern(mug):
    true, *_ = mug
    assert found(mug, true.rgb, torch.zeros_like(true.mask, dtype=torch.bool)) == 0
    assert pattern_found(true.rgb, true.mask > 0.5, true.rgb, true.asked.clamp_max(0)) is None
