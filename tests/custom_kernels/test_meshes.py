"""Triangles on a grid of pixels: the rasteriser against a plain loop, pictures in C++ against numpy."""

import numpy as np
import pytest

from custom_kernels import native
from custom_kernels.meshes import Projected, draw, draw_reference, rasterise


def test_rasteriser_agrees_with_a_loop_over_pixels():
    corners = np.random.default_rng(0).uniform(-3, 19, (12, 3, 2))
    found = {
        (int(p), int(f)): b
        for pixel, face, bary in rasterise(corners, 16, 13)
        for p, f, b in zip(pixel, face, bary, strict=True)
    }
    expected = {}
    for f, (a, b, c) in enumerate(corners):
        for y in range(13):
            for x in range(16):
                v, w = np.linalg.solve(np.stack([b - a, c - a], 1), np.array([x + 0.5, y + 0.5]) - a)
                if min(1 - v - w, v, w) >= 0:
                    expected[(y * 16 + x, f)] = (1 - v - w, v, w)
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for key, bary in expected.items():
        np.testing.assert_allclose(found[key], bary, rtol=0, atol=1e-9)


def test_rasteriser_skips_degenerate_and_outside_triangles():
    corners = np.array([[[1, 1], [5, 5], [9, 9]], [[-9, -9], [-3, -9], [-5, -2]], [[2, 2], [2, 2], [2, 2]]], float)
    assert sum(len(pixel) for pixel, _, _ in rasterise(corners, 8, 8)) == 0


def random_mesh(seed=1, count=300):
    """Triangles about a picture of 101 × 95 pixels: many overlap, some are behind the camera, absurd or degenerate."""
    random = np.random.default_rng(seed)
    points = random.uniform(-20, 120, (count, 1, 2)) + random.uniform(-15, 15, (count, 3, 2))
    points[:3] = [[[1, 1], [5, 5], [9, 9]], [[-1e300, 0], [1e300, 7], [4, 1e300]], [[np.nan, 0], [4, 4], [0, 4]]]
    inverse = np.where(random.uniform(size=(count, 3)) < 0.02, 0, random.uniform(0.1, 1, (count, 3)))
    points[10], inverse[10] = points[9], inverse[9]  # equally near
    texture = random.integers(0, 256, (16, 8, 3), np.uint8)
    faces = np.arange(3 * count).reshape(-1, 3)
    uv = random.uniform(-0.2, 1.2, (3 * count, 2))
    return Projected(points.reshape(-1, 2), inverse.reshape(-1), faces, uv, texture)


@pytest.mark.parametrize("samples", [1, 2])
def test_pictures_in_cpp_have_the_bytes_of_numpy_whatever_the_number_of_threads(instruction_set, samples):
    mesh, threads = random_mesh(), native.num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            native.set_num_threads(count)
            found.append(draw(mesh, 101, 95, samples, background=7))
    finally:
        native.set_num_threads(None)
    assert threads == native.num_threads()
    with np.errstate(all="ignore"):
        expected = draw_reference(mesh, 101, 95, samples, background=7)
    assert 0.3 < (expected != 7).any(-1).mean() < 1
    for picture in found:
        np.testing.assert_array_equal(picture, expected)


def test_without_compiled_kernels_the_reference_draws(monkeypatch):
    mesh = random_mesh(2, 20)
    expected = draw(mesh, 30, 20, 2)
    monkeypatch.setattr(native, "library", lambda: None)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(draw(mesh, 30, 20, 2), expected)


def edge_on(front=True, depths=(1.0, 3.0, 1.0), level=None):
    """A triangle whose first edge runs along the row's centres, u and the texture's levels from 0 to 1 along it."""
    points = np.array([[0.5, 0.5], [8.5, 0.5], [0.5, 8.5]])
    faces = np.array([[0, 2, 1]] if front else [[0, 1, 2]])
    levels = np.arange(256, dtype=np.uint8) if level is None else np.full(256, level, np.uint8)
    uv = np.array([[0.5 / 256, 0.5], [1 - 0.5 / 256, 0.5], [0.5 / 256, 0.5]])
    return Projected(points, 1 / np.array(depths), faces, uv, np.repeat(levels[None, :, None], 3, 2))


@pytest.mark.parametrize("function", [draw, draw_reference])
def test_colours_divide_by_depth_and_back_faces_are_not_drawn(function):
    """Half way along an edge from depth 1 to 3 on the screen, u is (0/1 + 1/3)/2 over (1 + 1/3)/2 = 1/4 of 255."""
    picture = function(edge_on(), 9, 9)
    assert picture[0, [0, 4, 8]].tolist() == [[0] * 3, [64] * 3, [255] * 3]
    assert (picture[8, 4] == 255).all()
    assert (function(edge_on(front=False), 9, 9, background=9) == 9).all()
    assert (function(edge_on(depths=(1, np.inf, 1)), 9, 9, background=9) == 9).all()


@pytest.mark.parametrize("function", [draw, draw_reference])
def test_the_nearest_is_seen_and_edges_are_means(function):
    """Two triangles, levels 0 and 200, the second nearer; an edge through the middle of a pixel covers half of it."""
    far, near = edge_on(level=0), edge_on(depths=(0.5, 0.5, 0.5), level=200)
    both = Projected(
        np.concatenate([far.points, near.points + 0.5]),
        np.concatenate([far.inverse, near.inverse]),
        np.concatenate([far.faces, near.faces + 3]),
        np.array([[0.1, 0.5]] * 3 + [[0.9, 0.5]] * 3),
        np.concatenate([far.texture[:, :128], near.texture[:, :128]], axis=1),
    )
    picture = function(both, 9, 9, samples=2, background=100)
    assert picture[2, 2].tolist() == [200] * 3
    assert picture[0, 3].tolist() == [50] * 3  # the lower row of samples is the far one's, the upper one empty


def test_arrays_that_do_not_fit_are_refused():
    mesh = edge_on()
    with pytest.raises(ValueError, match="faces name vertices 0 to 7 of 3"):
        draw(mesh._replace(faces=np.array([[0, 1, 7]])), 9, 9)
    with pytest.raises(ValueError, match="do not fit together"):
        draw(mesh._replace(inverse=np.ones(2)), 9, 9)
