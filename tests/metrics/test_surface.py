"""The pattern that is found: shifted it counts, without its contrast it does not."""

from dataclasses import replace

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.metrics.surface import blurred, pattern_found
from csd3d.world.objects import WorldObjects
from csd3d.world.scene import Scene

CAMERAS, GREY = orbit(4, 4.0, 30.0, 31.0, 96, 96), torch.tensor([0.62, 0.62, 0.63])


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


def test_a_pattern_counts_wherever_its_parts_lie(mug):
    true, *_ = mug
    assert found(mug, true.rgb) == pytest.approx(1, abs=0.01)
    assert found(mug, torch.roll(true.rgb, 4, 1)) > 0.8
    assert found(mug, true.rgb * 0.8) > 0.8  # darker


def test_one_colour_a_mixture_halves_speckle_and_blur_are_no_pattern(mug):
    true, first, second = mug
    assert max(found(mug, first), found(mug, second), found(mug, (first + second) / 2)) < 0.25
    halves = torch.cat((first[:, :48], second[:, 48:]), 1)
    speckle = torch.where(
        torch.rand(first.shape[:3], generator=torch.Generator().manual_seed(0))[..., None] < 0.5, first, second
    )
    assert found(mug, halves) < 0.6
    assert found(mug, speckle) < 0.4
    soft = [torch.stack([blurred(true.rgb[..., k], sigma) for k in range(3)], -1) for sigma in (0.015, 0.06)]
    assert found(mug, soft[0]) > 0.6 > 0.45 > found(mug, soft[1])


def test_what_is_not_there_has_no_pattern(mug):
    true, *_ = mug
    assert found(mug, true.rgb, torch.zeros_like(true.mask, dtype=torch.bool)) == 0
    assert pattern_found(true.rgb, true.mask > 0.5, true.rgb, true.asked.clamp_max(0)) is None
