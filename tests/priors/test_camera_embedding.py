"""Cameras as vectors and maps: known values, periods, and the row that tells none."""

import math

import pytest
import torch

from csd3d.cameras import look_at, on_sphere
from csd3d.priors.camera_embedding import AZIMUTH_WAVES, CAMERA_WIDTH, camera_embedding, camera_map, mirrored, no_camera


def embed(azimuth, elevation=0.0, distance=4.0):
    return camera_embedding(*(torch.tensor([float(x)]) for x in (azimuth, elevation, distance)))[0]


def test_the_components_are_the_documented_ones():
    found = embed(30, 60, 4.25)
    waves = range(1, AZIMUTH_WAVES + 1)
    sines, cosines = ([f(math.radians(30 * k)) for k in waves] for f in (math.sin, math.cos))
    wanted = [*sines, *cosines, math.sin(math.radians(60)), 0.5, 0.5, 1.0]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)
    assert found.shape == (CAMERA_WIDTH,)


def test_an_azimuth_is_the_same_after_a_turn():
    torch.testing.assert_close(embed(-90, 20), embed(270, 20), atol=1e-5, rtol=0)
    torch.testing.assert_close(embed(725), embed(5), atol=1e-5, rtol=0)


def test_left_differs_from_right_and_front_from_back():
    vectors = torch.stack([embed(azimuth) for azimuth in range(0, 360, 20)])
    apart = torch.cdist(vectors, vectors) + 10 * torch.eye(len(vectors))
    assert apart.min() > 0.5


def test_no_camera_is_a_row_that_no_camera_has():
    assert not no_camera(3).any()
    assert no_camera(3).shape == (3, CAMERA_WIDTH)
    assert embed(0)[-1] == 1


def test_one_elevation_goes_with_many_azimuths():
    found = camera_embedding(torch.tensor([0.0, 90.0]), torch.tensor(10.0), torch.tensor(4))
    torch.testing.assert_close(found[1], embed(90, 10))


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 0), (200, 35), (-50, 70)])
def test_the_map_is_the_plane_that_faces_the_camera_in_the_objects_axes(azimuth, elevation):
    """By the camera that renders: its right and up axes, counted in twentieths of a picture."""
    angles = (torch.deg2rad(torch.tensor([float(angle)])) for angle in (azimuth, elevation))
    right, up = look_at(4 * on_sphere(*angles), torch.zeros(3))[0, :, :2].unbind(1)
    found = camera_map(embed(azimuth, elevation)[None], 4, 6)[0]
    for row, y in enumerate((0.75, 0.25, -0.25, -0.75)):
        for column, x in enumerate((-5 / 6, -0.5, -1 / 6, 1 / 6, 0.5, 5 / 6)):
            torch.testing.assert_close(found[:, row, column], 10 * (x * right + y * up), atol=1e-5, rtol=0)


def test_the_map_of_no_camera_is_zero():
    assert camera_map(no_camera(2), 3, 5).shape == (2, 3, 3, 5)
    assert not camera_map(no_camera(2), 3, 5).any()


def test_the_mirrored_camera_is_on_the_other_side_and_none_stays_none():
    torch.testing.assert_close(mirrored(embed(70, 20, 3.8)[None])[0], embed(-70, 20, 3.8), atol=1e-6, rtol=0)
    assert not mirrored(no_camera(2)).any()
