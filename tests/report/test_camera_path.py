"""Camera paths of videos."""

import math

import pytest
import torch

from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.report.camera_path import looked_at, path_azimuths, video_cameras


@pytest.fixture(scope="module")
def capture(tiny_capture):
    return load_capture(SceneConfig(path=str(tiny_capture)))


def test_looked_at_is_where_the_axes_meet():
    cameras = orbit(7, 2.0, 20, 40, 8, 8, target=(0.3, -0.2, 0.5))
    assert torch.allclose(looked_at(cameras), torch.tensor([0.3, -0.2, 0.5]), atol=1e-4)


def test_path_goes_round_what_was_seen_from_all_sides_and_swings_where_it_was_not():
    round_trip = path_azimuths(torch.linspace(0, 2 * math.pi, 13)[:-1], 8)
    assert torch.allclose(round_trip.diff(), torch.full((7,), math.pi / 4))
    seen = torch.linspace(2.9, 3.9, 9)  # across the ±π seam
    swing = path_azimuths(torch.atan2(seen.sin(), seen.cos()), 40) % (2 * math.pi)
    assert swing.min() > 2.9
    assert swing.max() < 3.9
    assert swing.max() - swing.min() > 0.6


def test_video_cameras_keep_distance_and_elevation(capture):
    cameras = video_cameras(capture, 12)
    distance = (cameras.positions - looked_at(capture.cameras[capture.train])).norm(dim=1)
    assert distance.std() < 1e-4
    assert len(cameras) == 12
