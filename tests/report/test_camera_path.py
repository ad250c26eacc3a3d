"""Camera paths of videos."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.report.camera_path import looked_at, path_azimuths, video_cameras, write_camera_path


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


# --- captures that do not look at one point ---


def capture_of(poses, tmp_path):
    """A capture with these poses [B, 3, 4], all of them to train on."""
    meta = {"fl_x": 10.0, "w": 12, "h": 8, "frames": []}
    for i, pose in enumerate(poses.tolist()):
        name = f"{i:02d}.png"
        Image.fromarray(np.full((8, 12, 3), i, np.uint8)).save(tmp_path / name)
        meta["frames"].append({"file_path": name, "transform_matrix": [*pose, [0, 0, 0, 1]], "split": "train"})
    (tmp_path / "transforms.json").write_text(json.dumps(meta))
    return load_capture(SceneConfig(path=str(tmp_path)))


def turned(poses):
    """Cameras that look the other way, up kept."""
    return torch.cat((poses[:, :, :1] * -1, poses[:, :, 1:2], poses[:, :, 2:3] * -1, poses[:, :, 3:]), 2)


def nearest_view_cosine(path, capture):
    """For each camera of the path, the cosine between its axis and that of the photo taken nearest to it."""
    photos = capture.cameras[capture.train]
    nearest = torch.cdist(path.positions, photos.positions).argmin(1)
    return (path.camera_to_world[:, :, 2] * photos.camera_to_world[nearest, :, 2]).sum(1)


def check(path, count):
    assert len(path) == count
    pose = path.camera_to_world
    assert pose.isfinite().all()
    rotation = pose[:, :, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(count, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()
    moved = (pose - pose.roll(1, 0)).flatten(1).norm(dim=1)
    assert moved.max() < 0.7  # no jumps, and the last is near the first
    assert moved.max() > 1e-3  # it does not stand still


def test_a_room_seen_from_inside_is_walked_through_looking_outward(tmp_path):
    capture = capture_of(turned(orbit(24, 2.0, 15, 40, 12, 8).camera_to_world), tmp_path)
    path = video_cameras(capture, 72)
    check(path, 72)
    assert nearest_view_cosine(path, capture).min() > 0.9


def test_photos_all_round_are_still_circled(tmp_path):
    capture = capture_of(orbit(24, 2.0, 15, 40, 12, 8).camera_to_world, tmp_path)
    assert nearest_view_cosine(video_cameras(capture, 36), capture).min() > 0.9


def test_a_tripod_pans(tmp_path):
    poses = turned(orbit(16, 2.0, 10, 40, 12, 8).camera_to_world)
    poses[:, :, 3] = torch.tensor([1.0, 2.0, 0.5])
    capture = capture_of(poses, tmp_path)
    path = video_cameras(capture, 72)
    check(path, 72)
    torch.testing.assert_close(path.positions, capture.cameras.positions[:1].expand(72, 3), atol=1e-5, rtol=0)
    axes = path.camera_to_world[:, :, 2] @ capture.cameras.camera_to_world[:, :, 2].T
    assert axes.max(1).values.min() > 0.95  # of some photo
    assert axes.max(0).values.min() > 0.95  # and every photo is passed


@pytest.mark.parametrize("back_and_forth", [3, 12])
def test_a_slider_goes_back_and_forth(tmp_path, back_and_forth):
    poses = orbit(1, 2.0, 10, 40, 12, 8).camera_to_world.repeat(back_and_forth, 1, 1)
    poses[:, :, 3] += poses[:, :, 0] * 0.1 * torch.arange(back_and_forth)[:, None]
    path = video_cameras(capture_of(poses, tmp_path), 72)
    check(path, 72)
    assert (path.camera_to_world[:, :, 2] @ path.camera_to_world[0, :, 2]).min() > 0.9999


def test_one_photo_is_swayed_about(tmp_path):
    capture = capture_of(orbit(1, 2.0, 10, 40, 12, 8).camera_to_world, tmp_path)
    path = video_cameras(capture, 72)
    check(path, 72)
    photo = capture.cameras.camera_to_world[0]
    assert (path.camera_to_world[:, :, 2] @ photo[:, 2]).min() > 0.98
    assert (path.positions - photo[:, 3]).norm(dim=1).max() < 0.2


def test_paths_are_written_in_the_frame_of_the_capture(tmp_path):
    offset = torch.tensor([5e5, 4.1e6, 120.0], dtype=torch.float64)
    poses = orbit(12, 2.0, 15, 40, 12, 8).camera_to_world.double()
    poses[:, :, 3] += offset
    capture = capture_of(poses, tmp_path)
    path = video_cameras(capture, 6)
    write_camera_path(tmp_path / "camera_path.json", path, capture, 24)
    said = json.loads((tmp_path / "camera_path.json").read_text())
    assert [said["w"], said["h"], said["fps"]] == [12, 8, 24]
    found = torch.tensor([frame["transform_matrix"] for frame in said["frames"]], dtype=torch.float64)
    distance = (found[:, :3, 3] - offset).norm(dim=1)
    torch.testing.assert_close(distance, torch.full((6,), 2.0, dtype=torch.float64), atol=1e-4, rtol=0)
    ahead = ((offset - found[:, :3, 3]) * -found[:, :3, 2]).sum(1)
    torch.testing.assert_close(ahead, distance, atol=1e-4, rtol=0)
