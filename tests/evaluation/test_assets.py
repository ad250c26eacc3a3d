"""The judge of assets: the truth is perfect, each fault is seen by its own figure, and what is open is found."""

from dataclasses import replace

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.evaluation.assets import SeenAsset, judge_asset, nearest
from csd3d.world.objects import WorldObjects
from csd3d.world.scene import Scene

CHAIR = Scene("chair", "red", "stripes", "yellow", plate=False)
PROMPT = "a red chair with yellow stripes"
CAMERAS, GREY = orbit(8, 4.0, 30.0, 31.0, 64, 64), torch.tensor([0.62, 0.62, 0.63])
BOX = torch.tensor([-1.1, -1.1, -1.1, 1.1, 1.1, 1.1])


def seen(scene, prompt=PROMPT):
    """The scene as an asset."""
    objects = WorldObjects(prompt)
    true = objects.views(scene, CAMERAS, GREY)
    density = lambda p: 1e3 * (objects.distance(scene, p) < 0)  # noqa: E731
    return SeenAsset(true.rgb, (true.depth < 100).float(), true.depth, CAMERAS, GREY, density, BOX)


@pytest.fixture(scope="module")
def figures():
    shown = {
        "true": CHAIR,
        "plain": replace(CHAIR, pattern="plain"),
        "slab": replace(CHAIR, kind="cube", pattern="plain"),
        "plate": replace(CHAIR, plate=True),
    }
    return {name: judge_asset(seen(scene), WorldObjects(PROMPT), 4)[0] for name, scene in shown.items()}


def test_the_truth_is_right_in_every_figure(figures):
    true = figures["true"]
    assert true["object_psnr"] > 25
    assert true["object_ssim"] > 0.9
    assert min(true[key] for key in ("mask_iou", "volume_iou", "colours_found", "pattern_found")) > 0.9
    assert true["chamfer"] < 0.02
    assert true["stray_matter"] == 0


def test_a_chair_without_its_stripes_is_above_a_slab_and_below_the_truth(figures):
    assert figures["true"]["object_psnr"] > figures["plain"]["object_psnr"] + 5
    assert figures["plain"]["object_psnr"] > figures["slab"]["object_psnr"] + 1
    assert figures["plain"]["pattern_found"] < 0.1
    assert figures["plain"]["mask_iou"] > 0.9
    assert figures["slab"]["volume_iou"] < 0.5
    assert figures["slab"]["chamfer"] > 5 * figures["true"]["chamfer"]


def test_a_plate_is_not_the_object(figures):
    assert figures["plate"]["stray_matter"] > 0.2
    assert figures["plate"]["pattern_found"] > 0.8
    on_plate = judge_asset(seen(replace(CHAIR, plate=True), PROMPT), WorldObjects(PROMPT + ", on a plate"), 4)[0]
    assert on_plate["stray_matter"] == 0


def test_what_the_prompt_leaves_open_is_found():
    objects = WorldObjects("a purple object")
    found = nearest(seen(Scene("table", "purple", azimuth_deg=30.0, plate=False)), objects, 16, 0)
    assert (found.kind, found.colour) == ("table", "purple")
    assert found.azimuth_deg % 180 == pytest.approx(30, abs=16)


def test_dots_on_a_ball_may_be_turned():
    ball = Scene("ball", "white", "dots", "black", plate=False)
    objects = WorldObjects("a white ball with black dots")
    assert objects.near(ball)[-1].azimuth_deg == 330
    plain = WorldObjects("a white ball").near(replace(ball, pattern="plain"))
    assert {scene.azimuth_deg for scene in plain} == {0.0}


def test_an_asset_without_matter_has_figures():
    nothing = seen(CHAIR)
    nothing = replace(
        nothing, rgb=GREY.expand_as(nothing.rgb), opacity=0 * nothing.opacity, density=lambda p: p[:, 0] * 0
    )
    found, _ = judge_asset(nothing, WorldObjects(PROMPT), 2)
    assert found["mask_iou"] == found["volume_iou"] == found["colours_found"] == 0
    assert found["chamfer"] is None
    assert found["stray_matter"] is None
