"""The judge of assets: the truth is perfect, each fault is seen by its own figure, and what is open is found."""

from dataclasses import replace

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.evaluation.assets import SeenAsset, judge_asset, nearest, sides_right
from csd3d.evaluation.ground_truth import TrueViews
from csd3d.evaluation.normals import normal_consistency
from csd3d.evaluation.objects import coverage
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


def test_each_view_must_show_its_own_side():
    """A robot's front and back differ in its face alone; turned all round, at every view, and mirrored."""
    for scene in (CHAIR, replace(CHAIR, pattern="plain"), Scene("robot", "purple", plate=False)):
        objects = WorldObjects(f"a {scene.colour} {scene.kind}")
        true, asset = objects.views(scene, CAMERAS, GREY), seen(scene)
        noise = torch.rand(asset.rgb.shape, generator=torch.Generator().manual_seed(0))
        assert sides_right(asset, true) == sides_right(replace(asset, rgb=0.8 * asset.rgb + 0.2 * noise), true) == 1
        assert sides_right(replace(asset, rgb=asset.rgb.roll(4, 0)), true) < 0.5
        assert sides_right(replace(asset, rgb=asset.rgb[:1].expand_as(asset.rgb)), true) <= 0.25
    ball = Scene("ball", "white", "dots", "black", plate=False)
    dots = WorldObjects("a white ball with black dots").views(ball, CAMERAS, GREY)
    assert sides_right(seen(ball), dots) is None
    assert sides_right(asset, replace(true, asked=None)) is None
    three = [
        TrueViews(*(x[:3] for x in (true.rgb, true.depth, true.mask, true.asked))),
        replace(asset, rgb=true.rgb[:3]),
    ]
    assert sides_right(*reversed(three)) is None
    assert sides_right(replace(asset, rgb=asset.rgb * torch.nan), true) == 0


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


def test_different_right_objects_are_counted_by_what_the_prompt_leaves_open():
    objects = WorldObjects("a chair")
    red, blue = Scene("chair", "red"), Scene("chair", "blue", sun_azimuth_deg=200.0, backdrop="mint")
    good, blob = {"mask_iou": 0.8, "colours_found": 0.9}, {"mask_iou": 0.4, "colours_found": 0.9}
    assert objects.open_values(blue) == {"colour": "blue"}
    assert coverage([(good, red), (good, red), (good, blue)], objects) == {"distinct_answers": 2, "answers_covered": 2}
    lit = replace(red, sun_azimuth_deg=90.0, backdrop="white")  # light and backdrop make no other object
    assert coverage([(good, red), (good, lit), (blob, blue)], objects) == {"distinct_answers": 2, "answers_covered": 1}
    pale = good | {"colours_found": 0.2}
    assert coverage([(pale, red), (good | {"colours_found": None}, lit)], objects)["answers_covered"] == 1


def ball(side=64, radius=0.8):
    """A ball from two cameras: depth and opacity [2,S,S], the cameras, and a density with a soft surface."""
    cameras = orbit(2, 4.0, 30.0, 31.0, side, side)
    rays = [cameras.image_rays(i) for i in range(2)]
    along = torch.stack([-(o * d).sum(-1) for o, d in rays])
    missed = torch.stack([o.square().sum(-1) for o, _ in rays]) - along.square()
    depth = (along - (radius**2 - missed).clamp_min(0).sqrt()).view(2, side, side)
    opacity = (missed < radius**2).float().view(2, side, side)
    return depth, opacity, cameras, lambda p: 50 * torch.sigmoid((radius - p.norm(dim=-1)) / 0.02)


def test_normals_of_a_clear_surface_agree_and_those_of_noise_do_not():
    depth, opacity, cameras, density = ball()
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(depth.shape, generator=random)
    spots = lambda p: (p * 1e4).sin().prod(-1) + 1  # noqa: E731

    def share(depth, density):
        return normal_consistency(depth, opacity, cameras, density, torch.device("cpu"))

    assert share(depth, density) > 0.98
    assert share(depth + 0.2 * noise, density) < 0.2  # the depth is noise
    assert share(depth, spots) < 0.1  # the density is noise
    assert share(depth, lambda p: torch.ones(len(p))) == 0  # it has no surface
    assert 0.4 < share(torch.stack((depth[0], depth[1] + 0.2 * noise[1])), density) < 0.65  # one of two views
    assert normal_consistency(depth, 0 * opacity, cameras, density, torch.device("cpu")) is None


def test_a_step_in_depth_is_no_fault():
    """A plate before another: only the pixels in the density's gap are unclear."""
    cameras = orbit(1, 4.0, 90.0, 31.0, 64, 64)
    rays_o, rays_d = cameras.image_rays(0)
    points = rays_o + rays_d * (rays_o[:, 2:] - 0.5) / -rays_d[:, 2:]
    high = (points[:, 0] > 0).float() * 0.5
    depth = ((rays_o[:, 2] - high) / -rays_d[:, 2]).view(1, 64, 64)
    level = lambda p: 50 * torch.sigmoid((0.5 * (p[:, 0] * 3.5 / (4 - p[:, 2]) > 0) - p[:, 2]) / 0.02)  # noqa: E731
    share = normal_consistency(depth, torch.ones(1, 64, 64), cameras, level, torch.device("cpu"))
    assert share > 0.94


def test_an_asset_without_matter_has_figures():
    nothing = seen(CHAIR)
    nothing = replace(
        nothing, rgb=GREY.expand_as(nothing.rgb), opacity=0 * nothing.opacity, density=lambda p: p[:, 0] * 0
    )
    found, _ = judge_asset(nothing, WorldObjects(PROMPT), 2)
    assert found["mask_iou"] == found["volume_iou"] == found["colours_found"] == 0
    assert found["chamfer"] is None
    assert found["stray_matter"] is None
