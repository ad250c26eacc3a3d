"""The default panorama and video, and the truth about their edits, against closed forms."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from csd3d.cameras import Cameras
from csd3d.world import scroll
from csd3d.world.pairs import FOV_DEG
from csd3d.world.render import FAR, camera_row, render
from csd3d.world.scene import Scene
from csd3d.world.scroll import clip_edits, orbit_clip, render_strip, row_answers, strip_edits, true_flow, wide_strip
from csd3d.world.shapes import KINDS
from custom_kernels.native import library

needs_kernels = pytest.mark.skipif(library() is None, reason="kernels not built")
ANY_COLOUR, ANY_PATTERN = "paint it a bright colour", "give it a pattern"


@pytest.fixture(scope="module")
def strip():
    return wide_strip(3, 160, 40)


@pytest.fixture(scope="module")
def clip():
    return orbit_clip(1, frames=6, size=64, arc_deg=30)


# --------------------------------------------------------------------------------------------------------------- strip


@needs_kernels
def test_a_seed_is_a_strip(strip):
    again, other = wide_strip(3, 160, 40), wide_strip(4, 160, 40)
    assert np.array_equal(again.rgb, strip.rgb)
    assert again.scenes == strip.scenes != other.scenes
    assert strip.rgb.shape == (40, 160, 3)
    assert strip.rgb.dtype == strip.mask.dtype == np.float32
    assert 0 <= strip.rgb.min() < strip.rgb.max() <= 1


@needs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_objects_stand_side_by_side_under_one_sun(seed):
    strip = wide_strip(seed, 96, 24)
    assert len(strip.scenes) == 4
    shared = {(s.backdrop, s.sky, s.time, s.sun_azimuth_deg, s.sun_elevation_deg) for s in strip.scenes}
    assert len(shared) == 1
    assert len({s.kind for s in strip.scenes}) == len({s.colour for s in strip.scenes}) == 4
    assert np.array_equal(strip.object_masks.sum(0), strip.mask)
    for i, mask in enumerate(strip.object_masks):
        columns = np.flatnonzero(mask.max(0))
        assert 24 * i < columns.min() < columns.max() < 24 * (i + 1) - 1  # none touches the border of its cell
        assert mask.sum() > 0.08 * 24 * 24


@needs_kernels
def test_the_row_is_one_world_that_closes_on_itself(strip):
    """Objects moved on by one are the same picture moved on by a cell: no place in it is special, no border either."""
    moved, mask = render_strip((strip.scenes[-1], *strip.scenes[:-1]), 160, 40)
    assert np.array_equal(moved, np.roll(strip.rgb, 40, axis=1))
    assert np.array_equal(mask, np.roll(strip.mask, 40, axis=1))


@needs_kernels
def test_rays_are_parallel_across():
    """A ball is as many columns wide as its diameter holds, wherever it is looked at from."""
    scene = Scene("ball", "yellow")
    _, mask = render_strip([scene] * 3, 300, 100)
    pixel = scroll.DISTANCE * math.tan(math.radians(FOV_DEG) / 2) / 50  # world units
    for i in range(3):
        width = mask[:, 100 * i : 100 * (i + 1)].max(0).sum()
        assert width == pytest.approx(2 * 0.72 / pixel, abs=2)


@needs_kernels
def test_the_middle_of_a_cell_is_what_a_common_camera_sees():
    scene = Scene("robot", "cyan", azimuth_deg=25, backdrop="beige", sky="gradient")
    rgb, mask = render_strip([scene], 41, 41)
    camera = camera_row(0, scroll.ELEVATION_DEG, scroll.DISTANCE, FOV_DEG, 41, (0, 0, scroll.TARGET_Z))
    picture = render([scene], camera[None], 41, 41, samples=3)
    np.testing.assert_allclose(rgb[:, 20], picture.rgb[0, :, 20], atol=2e-2)
    np.testing.assert_allclose(mask[:, 20], picture.mask[0, :, 20], atol=0.12)
    assert np.abs(rgb[:, 20] - picture.rgb[0, :, 20]).mean() < 1e-3


@needs_kernels
def test_neighbours_cast_shadows():
    sun = {"sun_azimuth_deg": -90.0, "sun_elevation_deg": 35.0}  # from the left
    tall, low = Scene("chair", "pink", **sun), Scene("duck", "yellow", **sun)
    taller, lower = (render_strip([first, low, low], 240, 80)[0] for first in (tall, low))
    right, left = (taller - lower)[:, 80:160], (taller - lower)[:, 160:]  # cell 2 is also to the left of cell 0
    assert (right < -0.05).any(axis=2).sum() > 20
    assert np.abs(left).max() < 0.03  # shadow rays march in other steps past a neighbour


@needs_kernels
def test_true_edits_change_the_objects_alone_and_alike(strip):
    edits = strip_edits(strip, ANY_COLOUR)
    assert edits.shape == (3, 40, 160, 3)
    outside = strip.mask == 0
    for k, edit in enumerate(edits):
        assert np.array_equal(edit[outside], strip.rgb[outside])
        for mask in strip.object_masks:
            own = edit[(mask == 1) & (np.abs(edit - strip.rgb).max(2) > 0.02)]
            assert len(own) > 20
            assert own.mean(0).argmax() == k  # red, green, blue


@needs_kernels
def test_light_and_backdrop_change_everywhere(strip):
    (night,) = strip_edits(strip, "make it night")
    assert (night.mean(2) < strip.rgb.mean(2)).all()
    for k, backdrop in enumerate(strip_edits(strip, "make the background colourful")):
        assert backdrop[0].mean(0).argmax() == k
        solid = strip.mask == 1
        assert np.array_equal(backdrop[solid], strip.rgb[solid])


@needs_kernels
def test_unknown_words_have_no_truth(strip):
    assert strip_edits(strip, "make it better").shape == (0, 40, 160, 3)


@pytest.mark.parametrize("seed", range(20))
def test_every_ambiguous_instruction_has_its_answers_in_every_strip(seed):
    scenes = scroll._sample_row(random.Random(seed), 5)
    for words in (ANY_COLOUR, ANY_PATTERN, "make the background colourful", "turn it into a simple solid"):
        rows = row_answers(scenes, words)
        assert len(rows) == 3, words
    for row, kind in zip(row_answers(scenes, "turn it into a simple solid"), ("ball", "cylinder", "cone"), strict=True):
        assert {scene.kind for scene in row} == {kind}
    for k, row in enumerate(row_answers(scenes, ANY_PATTERN)):
        assert {scene.pattern for scene in row} == {("stripes", "checks", "dots")[k]}


def test_what_is_so_already_stays():
    scenes = (Scene("mug", "yellow"), Scene("duck", "pink"))
    assert row_answers(scenes, "make it yellow") == [(scenes[0], Scene("duck", "yellow"))]
    assert row_answers(scenes, "turn it into a duck") == [(Scene("duck", "yellow"), scenes[1])]


def test_no_truth_where_one_object_has_none():
    red = (Scene("mug", "red"), Scene("duck", "pink"))
    assert row_answers(red, ANY_COLOUR) == []  # whether red should stay red, nobody knows
    assert row_answers((Scene("ball", "red"), Scene("duck", "pink")), "turn it into a mug") == []  # turned how?
    assert row_answers((Scene("ball", "red"), Scene("duck", "pink")), ANY_PATTERN) == []


def test_objects_with_instructions_of_their_own():
    scenes = (Scene("mug", "yellow"), Scene("duck", "pink"), Scene("house", "cyan"), Scene("car", "orange"))
    rows = row_answers(scenes, ["make it blue", None, None, "turn it into a robot"])
    assert rows == [(Scene("mug", "blue"), *scenes[1:3], Scene("robot", "orange"))]
    rows = row_answers(scenes, [ANY_COLOUR, ANY_COLOUR, ANY_PATTERN, None])
    assert len(rows) == 9
    assert all(row[0].colour == row[1].colour and row[3] == scenes[3] for row in rows)
    assert len({(row[0].colour, row[2].pattern) for row in rows}) == 9
    assert row_answers(scenes, [None] * 4) == [scenes]
    with pytest.raises(ValueError, match="2 instructions for 4 objects"):
        row_answers(scenes, [None, None])


@needs_kernels
def test_instructions_of_their_own_stay_in_their_cells(strip):
    (edit,) = strip_edits(strip, [None, "make it blue", None, None])
    changed = np.abs(edit - strip.rgb).max(2) > 0
    assert changed.any()
    assert (strip.object_masks[1][changed] > 0).all()


# --------------------------------------------------------------------------------------------------------------- orbit


@needs_kernels
def test_a_seed_is_a_clip(clip):
    again = orbit_clip(1, frames=6, size=64, arc_deg=30)
    assert np.array_equal(again.frames, clip.frames)
    assert again.scene == clip.scene
    assert clip.frames.shape == (6, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.masks.shape == clip.depth.shape == (6, 64, 64)
    assert KINDS[clip.scene.kind].has_front
    back = clip.cameras[:, :12].reshape(6, 3, 4)[:, :2, 2]
    steps = np.diff(np.unwrap(np.arctan2(back[:, 1], back[:, 0])))
    np.testing.assert_allclose(np.abs(np.degrees(steps)), 5, atol=1e-3)
    assert len(set(np.sign(steps))) == 1
    with pytest.raises(ValueError, match="0 frames"):
        orbit_clip(1, frames=0)


@needs_kernels
def test_long_clips_are_rendered_in_parts_that_do_not_show():
    clip = orbit_clip(5, frames=scroll.CHUNK + 2, size=16)
    at = scroll.CHUNK
    alone = render([clip.scene], clip.cameras[at : at + 1], 16, 16)
    assert np.array_equal(clip.frames[at], np.round(alone.rgb[0] * 255).astype(np.uint8))
    assert np.array_equal(clip.masks[at], alone.mask[0])


@needs_kernels
def test_flow_is_the_projection_of_the_surface(clip):
    """Against csd3d.cameras: a ray out, its depth along it, and the point projected into the other frame."""
    rows = torch.from_numpy(clip.cameras)
    cameras = Cameras(rows[:, :12].reshape(-1, 3, 4), *rows[:, 12:].T, 64, 64)
    rays_o, rays_d = cameras.image_rays(1)
    depth = torch.from_numpy(clip.depth[1]).reshape(-1, 1)
    to, _ = cameras.project(rays_o + depth * rays_d, 4)
    flow, _ = true_flow(clip, 1, 4)
    y, x = np.mgrid[:64, :64] + 0.5
    expected = to.numpy().reshape(64, 64, 2) - np.stack([x, y], -1)
    surface = clip.depth[1] < FAR
    np.testing.assert_allclose(flow[surface], expected[surface], atol=1e-3)
    flow, visible = true_flow(clip, 2, 2)
    assert np.abs(flow).max() < 1e-3
    assert visible.mean() > 0.8


@needs_kernels
def test_the_backdrop_moves_as_at_infinity(clip):
    """On the horizontal through the middle it shifts by f tan of the turn, whatever the orbit's radius."""
    cameras = np.stack([camera_row(angle, 0, radius, FOV_DEG, 64) for angle, radius in ((20, 4), (25, 3))])
    flow, _ = true_flow(replace(clip, depth=np.full((2, 64, 64), FAR), cameras=cameras), 0, 1)
    focal, x = cameras[0, 12], np.arange(64) + 0.5 - 32
    expected = focal * np.tan(np.arctan(x / focal) + math.radians(5)) - x
    np.testing.assert_allclose(flow[31, :, 0], expected, atol=0.02)


@needs_kernels
@pytest.mark.parametrize("step", [1, 3])
def test_frames_warped_by_the_flow_agree(clip, step):
    rows, columns = np.mgrid[:64, :64]
    for i in range(6 - step):
        flow, visible = true_flow(clip, i, i + step)
        at = [rows + flow[..., 1], columns + flow[..., 0]]
        there = clip.frames[i + step].astype(float)
        warped = np.stack([map_coordinates(there[..., c], at, order=1, mode="nearest") for c in range(3)], -1)
        surface = visible & (clip.depth[i] < FAR)
        error = np.abs(warped - clip.frames[i])[surface]
        still = np.abs(there - clip.frames[i])[surface]
        assert surface.mean() > 0.25
        assert np.median(error) < 0.6  # a rounding of each frame; the mean counts edges, blurred by warping
        assert error.mean() < 0.4 * still.mean()


@needs_kernels
def test_what_is_covered_is_not_visible(clip):
    """Backdrop on which the object lies in the other frame is said to be hidden there."""
    flow, visible = true_flow(clip, 0, 5)
    v, u = np.nonzero(visible & (clip.depth[0] == FAR))
    to = np.floor(np.stack([u, v], -1) + 0.5 + flow[v, u]).astype(int)
    assert len(to) > 100
    assert clip.depth[5][to[:, 1].clip(0, 63), to[:, 0].clip(0, 63)].min() == FAR
    hidden = ~visible & (clip.depth[0] == FAR)
    assert hidden.sum() > 50


@needs_kernels
def test_true_edits_of_a_clip(clip):
    edits = clip_edits(clip, ANY_COLOUR)
    assert edits.shape == (3, 6, 64, 64, 3)
    assert edits.dtype == np.uint8
    outside = clip.masks == 0
    for k, edit in enumerate(edits):
        assert np.array_equal(edit[outside], clip.frames[outside])
        changed = np.abs(edit.astype(int) - clip.frames).max(-1) > 5
        assert changed.sum((1, 2)).min() > 50
        for frame, where in zip(edit, changed, strict=True):
            assert frame[where].mean(0).argmax() == k
    assert clip_edits(clip, "make it better").shape == (0, 6, 64, 64, 3)
