"""Meshes come back in the coordinates of the capture, at any distance from the origin, and files say how."""

import json
import struct

import numpy as np
import pytest
import torch
import trimesh

from csd3d.export import MeshConfig, Placement, capture_placement, export_mesh, write_scene_json
from csd3d.export.placement import FACING, UPRIGHT

AABB = np.array([-1.0, -1, -1, 1, 1, 1])
SMALL = MeshConfig(resolution=40, face_budget=1200, texture_size=64)
# three balls of different sizes, so that no rotation or mirror image looks alike
CENTRES, RADII = np.array([[0.5, 0.1, 0.0], [-0.4, 0.3, 0.2], [0.0, -0.5, -0.3]]), np.array([0.35, 0.25, 0.2])


def density(x):
    distance = (x[:, None] - torch.tensor(CENTRES, dtype=torch.float32)).norm(dim=2)
    return 200 * torch.sigmoid((torch.tensor(RADII, dtype=torch.float32) - distance).max(1).values / 0.02)


def field(x, directions):
    return (0.5 + 0.5 * x).clamp(0, 1), density(x)


def rotation_of(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def transform_of(rotation, offset):
    """[4, 4] of a capture whose frame has `offset` where the normalised one has its origin: x = s (R x_own + t)."""
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation, -rotation @ offset
    return transform


def parts_of(mesh):
    """Centres and radii of the balls, the largest first."""
    parts = sorted(mesh.split(only_watertight=False), key=lambda part: -part.area)
    return np.array([part.bounds.mean(0) for part in parts]), np.array(
        [np.ptp(part.bounds, axis=0).mean() / 2 for part in parts]
    )


def load(path):
    mesh = trimesh.load_mesh(path, process=False)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh


@pytest.fixture(scope="module")
def scene_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    plain = Placement(axes=np.eye(3), standing=False)
    export_mesh(density, field, AABB, folder, SMALL, placement=plain)
    return parts_of(load(folder / "mesh.ply"))


@pytest.mark.parametrize("rotation", [np.eye(3), rotation_of(1)], ids=["upright", "turned"])
@pytest.mark.parametrize(
    ("offset", "scale"),
    [((0, 0, 0), 1.0), ((0, 0, 0), 1e-3), ((5e5, 4.1e6, 120), 0.25), ((1e7, -1e7, 1e7), 1.0), ((3, 4, 5), 1e4)],
)
def test_files_are_in_the_frame_of_the_capture(tmp_path, scene_parts, rotation, offset, scale):
    """Within 0.5 % of the object's size, at offsets up to 1e7, in all formats."""
    transform = transform_of(rotation, np.array(offset, np.float64))
    placement = capture_placement(transform, scale, AABB)
    export_mesh(density, field, AABB, tmp_path, SMALL, placement=placement)
    write_scene_json(tmp_path / "scene.json", placement, AABB)
    said = {
        key: np.array(value)
        for key, value in json.loads((tmp_path / "scene.json").read_text()).items()
        if "_to_" in key
    }
    centres, radii = scene_parts
    expected = centres @ rotation / scale + offset
    size = 2.0 / scale
    for extension in ("ply", "obj", "glb"):
        found, sizes = parts_of(load(tmp_path / f"mesh.{extension}"))
        if extension == "glb":
            found = found @ said["glb_to_own"][:3, :3].T + said["glb_to_own"][:3, 3]
        assert np.abs(found - expected).max() < 5e-3 * size
        if rotation is not None and np.allclose(rotation, np.eye(3)):
            np.testing.assert_allclose(sizes, radii / scale, rtol=1e-3)
    for one, other in (("own_to_normalised", "normalised_to_own"), ("own_to_glb", "glb_to_own")):
        points = np.append(expected[0], 1)
        np.testing.assert_allclose(said[other] @ (said[one] @ points), points, rtol=1e-12, atol=1e-6 * size)
    mapped = said["own_to_normalised"] @ np.append(expected, np.ones((3, 1)), axis=1).T
    np.testing.assert_allclose(mapped[:3].T, centres, atol=1e-7)


def test_far_captures_have_an_offset_in_glb_and_near_ones_have_none(tmp_path):
    far = capture_placement(transform_of(np.eye(3), np.array([5e5, 4.1e6, 120.0])), 1.0, AABB)
    assert far.offset.tolist() == [5e5, 4.1e6, 120.0]
    export_mesh(density, field, AABB, tmp_path, SMALL, placement=far)
    data = (tmp_path / "mesh.glb").read_bytes()
    tree = json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])
    assert tree["asset"]["extras"] == {"offset": [5e5, 4.1e6, 120.0]}
    assert np.abs(trimesh.load_mesh(tmp_path / "mesh.glb").vertices).max() < 1
    assert not capture_placement(transform_of(np.eye(3), np.array([3.0, 4, 5])), 1.0, AABB).offset.any()


@pytest.mark.parametrize("name", UPRIGHT)
def test_the_axis_that_points_up_becomes_y_and_coordinates_keep_their_values(name):
    up = np.zeros(3)
    up["xyz".index(name[1])] = 1 if name[0] == "+" else -1
    turn = UPRIGHT[name]
    assert np.linalg.det(turn) == pytest.approx(1)
    assert (turn @ up).tolist() == [0, 1, 0]
    assert set(np.abs(turn).flatten()) == {0, 1}
    # a capture with that axis up: its normalised z is that axis
    rotation = UPRIGHT["+z"].T @ turn
    placement = capture_placement(transform_of(rotation, np.zeros(3)), 1.0, AABB)
    np.testing.assert_array_equal(placement.axes, turn)


def test_a_capture_with_no_axis_up_is_turned_upright():
    rotation = rotation_of(3)
    placement = capture_placement(transform_of(rotation, np.zeros(3)), 1.0, AABB)
    np.testing.assert_allclose(placement.gltf(np.array([[0.0, 0, 1]])), [[0, 1, 0]], atol=1e-12)


def test_an_object_from_words_faces_z_and_stands_on_the_ground():
    """Its front is at azimuth 0, +x of the scene (csd3d.cameras.on_sphere)."""
    points = Placement().gltf(np.array([[1.0, 0, 0.0], [0, 1, 0], [0, 0, 1], [0, 0, -0.5]]))
    np.testing.assert_allclose(points, [[0, 0.5, 1], [1, 0.5, 0], [0, 1.5, 0], [0, 0, 0]])
    assert np.linalg.det(FACING) == pytest.approx(1)
