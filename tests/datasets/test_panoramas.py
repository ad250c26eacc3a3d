"""Panoramas whose colours are directions, so that every pixel cut out of one tells whether it is the right one."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import HEIGHT, WIDTH, ring, transforms, write_capture

from csd3d.cameras import Cameras
from csd3d.datasets import SceneConfig, capture, load_capture
from csd3d.datasets.panoramas import FOV_RAD, face_rotations
from csd3d.errors import InputError

W, H = 256, 128


def directions() -> np.ndarray:
    """[H, W, 3] of a panorama's pixels in its camera's axes."""
    u, v = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5, indexing="xy")
    a, b = 2 * np.pi * (u / W - 0.5), np.pi * (0.5 - v / H)
    return np.stack((np.cos(b) * np.sin(a), np.sin(b), -np.cos(b) * np.cos(a)), -1)


def write_panoramas(folder, count: int = 9, masks: bool = False):
    meta = transforms(ring(count), camera_model="EQUIRECTANGULAR", w=W, h=H)
    write_capture(folder, meta, pictures=False)
    (folder / "images").mkdir()
    for i, frame in enumerate(meta["frames"]):
        Image.fromarray(np.round(127.5 * (directions() + 1)).astype(np.uint8)).save(folder / frame["file_path"])
        if masks:
            mask = np.where(directions()[..., 1] > 0, 255, 0).astype(np.uint8)  # the upper half
            Image.fromarray(mask).save(folder / f"mask{i}.png")
            frame["mask_path"] = f"mask{i}.png"
    return write_capture(folder, meta, pictures=False)


def test_every_pixel_shows_its_own_direction(tmp_path):
    found = load_capture(SceneConfig(str(write_panoramas(tmp_path)), orientation="none"))
    assert found.images.shape[0] == 54
    poses = ring().camera_to_world
    for i, name in enumerate(found.names):
        _, rays_d = found.cameras.image_rays(i)
        own = rays_d @ poses[int(name[7:9]), :, :3]  # in the panorama's axes
        colours = found.images[i].reshape(-1, 3) * 2 - 1
        assert (colours - own).abs().max() < 0.03, name


def test_the_views_cover_all_directions_and_overlap(tmp_path):
    rotations = face_rotations()
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    rays = np.random.default_rng(0).normal(size=(2000, 3))
    local = np.einsum("kij,rj->kri", rotations.transpose(0, 2, 1), rays)
    inside = (np.abs(local[..., :2]).max(-1) <= np.tan(FOV_RAD / 2) * -local[..., 2]) & (local[..., 2] < 0)
    assert inside.any(0).all()
    assert 0 < (inside.sum(0) > 1).mean() < 0.5


def test_whole_panoramas_are_held_out_and_each_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    original = capture.decode
    monkeypatch.setattr(capture, "decode", lambda file, *rest: decoded.append(file) or original(file, *rest))
    found = load_capture(SceneConfig(str(write_panoramas(tmp_path)), downscale=2))
    assert {found.names[i][:9] for i in found.test} == {"images/00", "images/08"}
    assert len(found.test) == 12
    assert len(decoded) == len(set(decoded)) == 9
    assert found.images.shape[1] == found.images.shape[2] == round(round(W / np.pi * np.tan(FOV_RAD / 2)) / 2)


def test_a_mask_is_cut_like_its_panorama(tmp_path):
    found = load_capture(SceneConfig(str(write_panoramas(tmp_path, 2, masks=True))))
    by_name = {name.partition(" ")[2]: found.masks[i] for i, name in enumerate(found.names)}
    assert by_name["up"].float().mean() > 0.95
    assert not by_name["down"].any()
    side = by_name["front"].shape[0]
    assert by_name["front"][: side // 2 - 1].all()
    assert not by_name["left"][side // 2 + 1 :].any()


def test_a_picture_that_is_not_twice_as_wide_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"12x8; expected an equirectangular picture"):
        load_capture(SceneConfig(str(write_capture(tmp_path, transforms(camera_model="EQUIRECTANGULAR")))))


def test_full_opencv_projects_as_opencv_does(tmp_path):
    keys = {"k1": 0.2, "k2": -0.1, "p1": 0.003, "p2": -0.002, "k3": 0.02, "k4": 0.3, "k5": -0.05, "k6": 0.01}
    meta = transforms(camera_model="FULL_OPENCV", cx=5.5, cy=4.5, **keys)
    found = load_capture(SceneConfig(str(write_capture(tmp_path, meta)), orientation="none", centre="none"))
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (30, 3))
    for i in (0, 4):
        pose = np.eye(4)
        pose[:3] = found.cameras.camera_to_world[i].double().numpy()
        world_to_camera = np.diag([1.0, -1, -1, 1]) @ np.linalg.inv(pose)
        matrix = np.array([[10.0, 0, 5.5], [0, 10.0, 4.5], [0, 0, 1]])
        turn, _ = cv2.Rodrigues(world_to_camera[:3, :3])
        expected, _ = cv2.projectPoints(points, turn, world_to_camera[:3, 3], matrix, np.array(list(keys.values())))
        pixels, _ = found.cameras.project(torch.from_numpy(points).float(), i)
        np.testing.assert_allclose(pixels, expected[:, 0], atol=1e-3)
        rays_o, rays_d = found.cameras.rays(torch.full((30,), i), pixels)  # and back
        again, _ = found.cameras.project(rays_o + 2 * rays_d, i)
        torch.testing.assert_close(again, pixels, atol=1e-3, rtol=0)
    assert isinstance(found.cameras, Cameras)
    assert (found.cameras.width, found.cameras.height) == (WIDTH, HEIGHT)
