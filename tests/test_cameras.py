"""Cameras against closed forms: axes, round trips through the lens, OpenCV's own numbers, orbits."""

import math

import numpy as np
import pytest
import torch

from csd3d.cameras import Cameras, _newton_step, distort, fold_radius, look_at, orbit, pixel_centres, undistort

LENSES = {
    "fox": (0.0578421, -0.0805099, 0.0, 0.0, -0.000980296, 0.00015575),
    "barrel": (-0.25, 0.06, -0.004, 0.0005, 0.002, -0.003),
    "pincushion": (0.3, 0.1, 0.05, 0.01, -0.01, 0.01),
}
FISHEYE = (0.05, -0.01, 0.004, -0.001, 0.0, 0.0)


def camera(lens=None, fisheye=False, width=64, height=48) -> Cameras:
    """Two cameras with different focal lengths, centres off the middle, at odd angles."""
    poses = look_at(torch.tensor([[2.0, -1.0, 0.7], [-0.5, 3.0, 1.5]]), torch.tensor([0.1, 0.2, -0.3]))
    k = None if lens is None else torch.tensor([lens, lens])
    values = [torch.tensor(v) for v in ((50.0, 70.0), (55.0, 66.0), (30.0, 35.0), (25.0, 22.0))]
    return Cameras(poses, *values, width=width, height=height, distortion=k, fisheye=fisheye)


def test_axes_of_the_simplest_camera():
    pose = torch.eye(4)[None, :3]
    one = torch.tensor([10.0])
    cameras = Cameras(pose, one, one, torch.tensor([2.0]), torch.tensor([2.0]), width=4, height=4)
    _, rays_d = cameras.rays(torch.zeros(3, dtype=torch.long), torch.tensor([[2.0, 2.0], [12.0, 2.0], [2.0, 12.0]]))
    h = math.sqrt(0.5)
    expected = torch.tensor([[0.0, 0.0, -1.0], [h, 0.0, -h], [0.0, -h, -h]])  # ahead is -z, right +x, down -y
    torch.testing.assert_close(rays_d, expected)
    pixels, depth = cameras.project(torch.tensor([[1.0, 0.0, -5.0], [0.0, 1.0, -5.0]]), 0)
    torch.testing.assert_close(pixels, torch.tensor([[4.0, 2.0], [2.0, 0.0]]))
    torch.testing.assert_close(depth, torch.tensor([5.0, 5.0]))


@pytest.mark.parametrize("lens", [None, *LENSES.values()])
def test_projection_of_points_on_rays_is_their_pixel(lens):
    cameras = camera(lens)
    for index in range(2):
        rays_o, rays_d = cameras.image_rays(index)
        t = torch.linspace(0.5, 6.0, len(rays_o))[:, None]
        pixels, depth = cameras.project(rays_o + t * rays_d, index)
        torch.testing.assert_close(pixels, pixel_centres(64, 48), rtol=0, atol=1e-3)
        axis = -cameras.camera_to_world[index, :, 2]
        torch.testing.assert_close(depth, (t * rays_d) @ axis, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rays_d.norm(dim=-1), torch.ones(len(rays_d)))


def test_fisheye_round_trip_reaches_behind_the_camera():
    cameras = camera(FISHEYE, fisheye=True, width=120, height=100)
    rays_o, rays_d = cameras.image_rays(0)
    axis = -cameras.camera_to_world[0, :, 2]
    assert (rays_d @ axis).min() < -0.5  # this picture does see past 90 degrees
    pixels, _ = cameras.project(rays_o + 2 * rays_d, 0)
    angle = (rays_d @ axis).clamp(-1, 1).acos()
    seen = angle < min(fold_radius(torch.tensor(FISHEYE)), math.pi) - 0.1
    assert seen.float().mean() > 0.5
    torch.testing.assert_close(pixels[seen], pixel_centres(120, 100)[seen], rtol=0, atol=5e-3)


@pytest.mark.parametrize("lens", [None, FISHEYE])
def test_lenses_of_both_kinds_in_one_batch(lens):
    mixed = camera(lens, fisheye=torch.tensor([False, True]))
    pixels = pixel_centres(mixed.width, mixed.height)
    indices = torch.arange(len(pixels)) % 2
    rays_o, rays_d = mixed.rays(indices, pixels)
    for index, fisheye in enumerate((False, True)):
        alone = camera(lens, fisheye)
        mine = indices == index
        torch.testing.assert_close(rays_d[mine], alone.rays(indices[mine], pixels[mine])[1], atol=0, rtol=0)
        points = rays_o[mine] + 2 * rays_d[mine]
        torch.testing.assert_close(mixed[1 - torch.arange(2)].project(points, 1 - index), alone.project(points, index))


def test_fisheye_without_coefficients_is_equidistant():
    cameras = camera(None, fisheye=True)
    axis = -cameras.camera_to_world[0, :, 2]
    _, rays_d = cameras.rays(torch.tensor([0]), torch.tensor([[30.0 + 50.0 * 1.0, 25.0]]))  # one radian to the right
    torch.testing.assert_close(rays_d @ axis, torch.tensor([math.cos(1.0)]))


def test_distort_matches_numbers_worked_by_hand():
    """x=0.3, y=-0.2: r2=0.13, d = 1 + .1*.13 + .2*.0169 = 1.01638; the tangential part with p1=.01, p2=.02."""
    k = torch.tensor([0.1, 0.2, 0.0, 0.0, 0.01, 0.02], dtype=torch.float64)
    got = distort(torch.tensor([0.3, -0.2], dtype=torch.float64), k)
    x = 0.3 * 1.01638 + 2 * 0.01 * 0.3 * -0.2 + 0.02 * (0.13 + 2 * 0.09)
    y = -0.2 * 1.01638 + 0.01 * (0.13 + 2 * 0.04) + 2 * 0.02 * 0.3 * -0.2
    np.testing.assert_allclose(got.numpy(), [x, y], rtol=1e-12)


@pytest.mark.parametrize("lens", LENSES.values(), ids=LENSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_undistort_inverts_distort(lens, dtype, tolerance):
    k = torch.tensor(lens, dtype=dtype)
    reach = min(0.9 * fold_radius(k), 1.2)
    angle = torch.linspace(0, 2 * math.pi, 41, dtype=dtype)
    r = torch.linspace(0, reach, 30, dtype=dtype)
    xy = torch.stack((r[:, None] * angle.cos(), r[:, None] * angle.sin()), dim=-1)
    torch.testing.assert_close(undistort(distort(xy, k), k), xy, rtol=0, atol=tolerance)


def test_the_newton_step_solves_with_the_jacobian_of_distort():
    k = torch.tensor(LENSES["pincushion"], dtype=torch.float64)
    xy, residual = torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([0.02, 0.05], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda point: distort(point, k), xy)
    step = torch.stack(_newton_step(*xy, tuple(residual), tuple(k)))
    torch.testing.assert_close(jacobian @ step, residual)


def test_undistort_stays_finite_where_there_is_no_inverse():
    k = torch.tensor([-0.5, 0.0, 0.0, 0.0, 0.0, 0.0])  # turns back at r = sqrt(2/3), r d = 0.544
    found = undistort(torch.tensor([[3.0, 1.0], [0.0, 0.9], [-40.0, 2.0]]), k)
    assert found.isfinite().all()
    assert fold_radius(k) == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_points_past_the_fold_do_not_land_in_the_picture():
    cameras = camera(LENSES["fox"])
    k = torch.tensor(LENSES["fox"])
    folded = distort(torch.tensor([2.0, 0.1]), k)
    assert folded.norm() < 0.3  # the plain formula would put this far-off point near the middle
    axes = cameras.camera_to_world[0, :, :3]
    point = cameras.positions[0] + axes @ torch.tensor([2.0, -0.1, -1.0])
    pixel, depth = cameras.project(point[None], 0)
    assert depth > 0
    assert pixel[0, 0] > cameras.width


def test_resizing_and_indexing_keep_the_rays():
    cameras = camera(LENSES["fox"])
    small = cameras.resized(32, 16)  # by 2 across, by 3 down
    index, pixels = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 4.0], [30.0, 15.0], [31.0, 1.0]])
    torch.testing.assert_close(small.rays(index, pixels)[1], cameras.rays(index, pixels * torch.tensor([2.0, 3.0]))[1])
    second, both = cameras[1], cameras[torch.tensor([1, 0])]
    assert (len(second), len(cameras[-1]), len(both), len(cameras[:1])) == (1, 1, 2, 1)
    torch.testing.assert_close(second.image_rays(0)[1], cameras.image_rays(1)[1])
    torch.testing.assert_close(both.positions, cameras.positions.flip(0))
    with pytest.raises(IndexError):
        cameras[2]


def test_look_at_is_a_rotation_that_sees_its_target_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(50, 3, generator=generator)
    position[0], position[1] = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, -2.0])  # straight down and up
    pose = look_at(position, torch.zeros(3))
    rotation = pose[:, :, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50))
    torch.testing.assert_close(-rotation[:, :, 2], torch.nn.functional.normalize(-position, dim=-1))
    assert (rotation[2:, 2, 0].abs() < 1e-5).all()  # the horizon is level
    assert (rotation[2:, 2, 1] > 0).all()  # and up is up
    with pytest.raises(ValueError, match="same point"):
        look_at(torch.zeros(1, 3), torch.zeros(3))


def test_orbit_geometry():
    target = torch.tensor([0.5, -0.2, 0.1])
    cameras = orbit(6, 3.0, 30.0, 40.0, width=20, height=10, azimuth_start_deg=90.0, target=target.tolist())
    offset = cameras.positions - target
    torch.testing.assert_close(offset.norm(dim=-1), torch.full((6,), 3.0))
    torch.testing.assert_close(offset[:, 2], torch.full((6,), 1.5))
    torch.testing.assert_close(offset[0], torch.tensor([0.0, 3 * math.cos(math.pi / 6), 1.5]), atol=1e-5, rtol=0)
    for index in range(6):
        pixel, depth = cameras.project(target[None], index)
        torch.testing.assert_close(pixel, torch.tensor([[10.0, 5.0]]), atol=1e-4, rtol=0)
        torch.testing.assert_close(depth, torch.tensor([3.0]))
    _, rays_d = cameras.rays(torch.tensor([0, 0]), torch.tensor([[10.0, 0.0], [10.0, 10.0]]))  # top and bottom edge
    assert math.degrees(math.acos((rays_d[0] @ rays_d[1]).item())) == pytest.approx(40.0, abs=1e-3)


def test_wrong_shapes_are_refused():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        Cameras(torch.eye(4).expand(2, 4, 4), one, one, one, one, width=4, height=4)
    with pytest.raises(ValueError, match="distortion"):
        Cameras(torch.eye(4)[:3].expand(2, 3, 4), one, one, one, one, width=4, height=4, distortion=torch.zeros(2, 4))
