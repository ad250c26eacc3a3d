"""The world's two renderers against each other and against closed forms."""

import json
import random

import numpy as np
import pytest
import torch

from csd3d.world.language import FAMILIES
from csd3d.world.pairs import sample_pair, write_pairs
from csd3d.world.reference import render_reference, scene_distance, shape_distance
from csd3d.world.render import FAR, camera_row, render
from csd3d.world.scene import Arrays, Scene, compile_scene
from csd3d.world.shapes import KINDS
from custom_kernels.native import library

needs_kernels = pytest.mark.skipif(library() is None, reason="kernels not built")


@needs_kernels
def test_kernel_agrees_with_reference():
    rng = random.Random(3)
    pairs = [sample_pair(rng) for _ in range(12)]
    scenes, cameras = [p[2] for p in pairs], np.stack([p[3].row(24) for p in pairs])
    fast, slow = render(scenes, cameras, 24, 24), render_reference([compile_scene(s) for s in scenes], cameras, 24, 24)
    np.testing.assert_allclose(fast.mask, slow.mask, atol=0.26)  # a grazing ray may fall on either side
    for name, atol in (("rgb", 2e-2), ("albedo", 1e-3), ("depth", 5e-3)):
        error = np.abs(getattr(fast, name) - getattr(slow, name))
        assert (error > atol).mean() < 2e-3, name


@needs_kernels
def test_threads_do_not_matter():
    scene, rows = Scene("mug", "red"), np.stack([camera_row(20, 30, 4, 38, 33)])
    threads = torch.get_num_threads()
    try:
        pictures = []
        for count in (1, 2):
            torch.set_num_threads(count)
            pictures.append(render([scene], rows, 33, 33).rgb)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*pictures)


@needs_kernels
def test_depth_is_the_distance_to_the_ball():
    rows = np.stack([camera_row(0, 0, 4, 38, 65)])
    picture = render([Scene("ball", "red")], rows, 65, 65, samples=1)
    # the middle ray runs at z = 0; the ball's centre is (0, 0, -0.08), its radius 0.72
    assert picture.depth[0, 32, 32] == pytest.approx(4 - np.sqrt(0.72**2 - 0.08**2), abs=2e-3)
    assert picture.depth[0, 0, 0] == FAR
    assert picture.mask[0, 32, 32] == 1
    assert picture.mask[0, 0, 0] == 0


def test_distances_of_primitives():
    def at(shape, size, *point):
        return shape_distance(
            shape, torch.tensor([*size, 0, 0, 0, 0][:4], dtype=torch.float), torch.tensor([point])
        ).item()

    assert at("sphere", (0.5,), 2.0, 0.0, 0.0) == pytest.approx(1.5)
    assert at("box", (1.0, 2.0, 3.0), 2.0, 3.0, 0.0) == pytest.approx(2**0.5)
    assert at("box", (1.0, 2.0, 3.0), 0.0, 0.0, 0.0) == pytest.approx(-1)
    assert at("cylinder", (1.0, 2.0), 4.0, 0.0, 6.0) == pytest.approx(5)
    assert at("cone", (1.0, 1.0, 2.0), 4.0, 0.0, 6.0) == pytest.approx(5)
    assert at("cone", (1.0, 0.0, 0.5), 0.0, 0.0, 0.0) == pytest.approx(-0.5 / 2**0.5)
    assert at("torus", (2.0, 0.5), 0.0, 0.0, 0.0) == pytest.approx(1.5)
    assert at("capsule", (0.5, 1.0), 0.0, 0.0, 3.0) == pytest.approx(1.5)
    assert at("tube", (1.0, 0.1, 2.0), 0.0, 0.0, 0.0) == pytest.approx(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_is_one_lipschitz_and_objects_stay_in_bounds(kind):
    """What sphere tracing rests on: |d(p) − d(q)| ≤ |p − q|; and nothing leaves the ball that rays are clipped to."""
    arrays = compile_scene(Scene(kind, "red", hat="blue", azimuth_deg=77))
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(500, 3, generator=generator) * 3 - 1.5
    q = p + 0.05 * torch.randn(500, 3, generator=generator)
    gap = (scene_distance(arrays, p)[0] - scene_distance(arrays, q)[0]).abs()
    assert (gap <= (p - q).norm(dim=1) + 1e-5).all()
    shell = torch.nn.functional.normalize(torch.randn(4000, 3, generator=generator), dim=1) * 1.45
    assert (scene_distance(arrays, shell)[0] > 0).all()


def test_turning_object_and_camera_together_changes_nothing_but_the_light():
    def picture(turn):
        scene = compile_scene(Scene("duck", "yellow", azimuth_deg=turn, pattern="dots"))
        world = scene.globals.copy()
        world[3:6] = 0  # no sun, which does not turn
        return render_reference(
            [Arrays(scene.primitives, scene.materials, world)], camera_row(10 + turn, 30, 4, 38, 24)[None], 24, 24
        )

    first, second = picture(0), picture(50)
    assert np.abs(first.rgb - second.rgb).mean() < 2e-3
    assert np.abs(first.mask - second.mask).max() <= 0.5


def test_pairs_are_the_same_for_a_seed_and_show_what_they_say(tmp_path):
    for name in ("a", "b"):
        write_pairs(tmp_path / name, 6, seed=4, size=16)
    for file in ("source.u8", "target.u8", "mask.u8", "pairs.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "source.u8").stat().st_size == 6 * 16 * 16 * 3
    assert len(FAMILIES) >= 8


def test_answers_hold_the_target_among_them(tmp_path):
    write_pairs(tmp_path, 24, seed=2, size=16, answers=True)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    answers = np.fromfile(tmp_path / "answers.u8", np.uint8).reshape(-1, 16, 16, 3)
    targets = np.fromfile(tmp_path / "target.u8", np.uint8).reshape(-1, 16, 16, 3)
    ambiguous = [i for i, line in enumerate(lines) if line["ambiguous"]]
    assert ambiguous
    for i in ambiguous:
        first, count = lines[i]["answers"]
        assert count == 3
        assert any(np.array_equal(targets[i], answer) for answer in answers[first : first + count])
    assert len(answers) == 3 * len(ambiguous)
