"""Triangles on a grid of pixels: rasteriser and z-buffer against plain loops."""

import numpy as np
import pytest
import torch

from custom_kernels import native
from custom_kernels.meshes import rasterise, z_buffer, z_buffer_reference


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


@pytest.mark.skipif(native.library() is None, reason="C++ kernels are not built")
def test_z_buffer_in_cpp_is_the_reference_whatever_the_number_of_threads():
    random = np.random.default_rng(1)
    corners = random.uniform(-40, 240, (300, 1, 2)) + random.uniform(-30, 30, (300, 3, 2))
    corners[:3] = [[[1, 1], [5, 5], [9, 9]], [[-1e300, 0], [1e300, 7], [4, 1e300]], [[np.nan, 0], [4, 4], [0, 4]]]
    inverse, uv = random.uniform(0.1, 1, (300, 3)), random.uniform(0, 1, (300, 3, 2))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(z_buffer(corners, inverse, uv, 201, 190))
    finally:
        torch.set_num_threads(threads)
    for one, four in zip(*found, strict=True):
        assert one.tobytes() == four.tobytes()
    with np.errstate(all="ignore"):
        expected = z_buffer_reference(corners[3:], inverse[3:], uv[3:], 201, 190)
    found = z_buffer(corners[3:], inverse[3:], uv[3:], 201, 190)
    assert (expected[0] > 0).mean() > 0.5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)


def test_z_buffer_keeps_the_nearest_and_divides_by_depth():
    """Half way along an edge from depth 1 to depth 3 on the screen, u is (0/1 + 1/3)/2 over (1 + 1/3)/2 = 1/4."""
    near = np.array([[0.5, 0.5], [8.5, 0.5], [0.5, 8.5]])
    corners, inverse = np.stack([near, near]), np.array([[0.2, 0.2, 0.2], [1, 1 / 3, 1]])
    uv = np.array([[[9, 9]] * 3, [[0, 0], [1, 0], [0, 0]]], float)
    for function in (z_buffer, z_buffer_reference):
        nearest, found = function(corners, inverse, uv, 9, 9)
        np.testing.assert_allclose(found[4], [0.25, 0], atol=1e-12)
        np.testing.assert_allclose(nearest[4], 2 / 3)
