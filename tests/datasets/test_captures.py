"""Captures as they should be: intrinsics, frames of reference, splits, pictures, and the real fox."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import FOCAL, HEIGHT, WIDTH, picture, ring, transforms, write_capture

from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.datasets.images import area_resize
from csd3d.datasets.normalise import focus_of_attention, rotation_between

BOX = [[-1.0, -2.0, -0.5], [1.5, 2.0, 3.0]]


def load(folder, **config):
    return load_capture(SceneConfig(str(folder), **config))


def project_own(capture, points_own, index):
    """Pixels of points given in the capture's own frame, through transform and scale."""
    transform = capture.transform.float()
    points = capture.scale * (points_own @ transform[:3, :3].T + transform[:3, 3])
    return capture.cameras.project(points, index)[0]


# --- frames of reference ---


@pytest.mark.parametrize("centre", ["poses", "focus", "none", "auto"])
@pytest.mark.parametrize("orientation", ["up", "none"])
@pytest.mark.parametrize("auto_scale", [True, False])
def test_points_keep_their_pixels_and_map_back(tmp_path, orientation, centre, auto_scale):
    """Whatever the normalisation, a point of the capture's frame is seen at the same pixel as before it."""
    cameras = orbit(5, 3.0, 20.0, 50.0, WIDTH, HEIGHT, target=(1.0, 2.0, 3.0))
    meta = transforms(cameras, fl_x=FOCAL, fl_y=FOCAL * 1.1, cx=5.0, cy=4.5)
    capture = load(write_capture(tmp_path, meta), orientation=orientation, centre=centre, auto_scale=auto_scale)
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.tensor([1.0, 2.0, 3.0])
    for index in range(5):
        local = (points - cameras.positions[index]) @ cameras.camera_to_world[index, :, :3]
        expected = torch.stack((FOCAL * local[:, 0], -1.1 * FOCAL * local[:, 1]), -1) / -local[:, 2:]
        expected += torch.tensor([5.0, 4.5])
        torch.testing.assert_close(project_own(capture, points, index), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        capture.map_back(capture.cameras.positions), cameras.positions.double(), atol=1e-4, rtol=0
    )
    if auto_scale:
        assert capture.cameras.positions.abs().max() == pytest.approx(1.0)
    else:
        assert capture.scale == 1.0


def test_up_turns_the_mean_up_to_z_and_focus_is_what_the_cameras_look_at(tmp_path):
    cameras = orbit(12, 3.0, 25.0, 50.0, WIDTH, HEIGHT)
    tilt = torch.from_numpy(rotation_between(np.array([0.2, -0.9, 0.1]), np.array([0.0, 0.0, 1.0]))).float()
    offset = torch.tensor([10.0, -20.0, 5.0])
    poses = torch.cat((tilt @ cameras.camera_to_world[:, :, :3], (cameras.positions @ tilt.T + offset)[..., None]), -1)
    tilted = type(cameras)(poses, cameras.fx, cameras.fy, cameras.cx, cameras.cy, WIDTH, HEIGHT)
    capture = load(write_capture(tmp_path, transforms(tilted)))
    up = torch.nn.functional.normalize(capture.cameras.camera_to_world[:, :, 1].mean(0), dim=0)
    torch.testing.assert_close(up, torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        capture.map_back(torch.zeros(1, 3)), offset[None].double(), atol=1e-4, rtol=0
    )  # they look there
    on_poses = load(tmp_path, centre="poses")
    torch.testing.assert_close(on_poses.cameras.positions.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert capture.unbounded
    assert capture.aabb.tolist() == [-1, -1, -1, 1, 1, 1]


def test_upside_down_and_sideways_rigs_have_a_rotation():
    z = np.array([0.0, 0.0, 1.0])
    for a in np.vstack((-np.eye(3), np.eye(3), [[1e-7, 0, -1.0], [3.0, -4.0, 1.0]])):
        rotation = rotation_between(a, z)
        np.testing.assert_allclose(rotation @ a / np.linalg.norm(a), z, atol=1e-6)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_focus_ignores_cameras_that_look_away_and_survives_parallel_ones():
    ring_poses = np.tile(np.eye(4), (6, 1, 1))
    ring_poses[:, :3] = orbit(6, 2.0, 10.0, 50.0, 8, 8, target=(1.0, 0.0, 0.0)).camera_to_world.double().numpy()
    away = ring_poses[:1].copy()
    away[0, :3, 2] = [-0.6, 0.0, -0.8]  # stands with the others, but looks up and outward, past the focus
    poses = np.concatenate((ring_poses, away))
    np.testing.assert_allclose(focus_of_attention(poses, poses[:, :3, 3].mean(0)), [1.0, 0.0, 0.0], atol=1e-5)
    parallel = np.tile(np.eye(4), (3, 1, 1))
    parallel[:, 0, 3] = [0.0, 1.0, 2.0]
    start = np.array([1.0, 0.0, -1.0])
    np.testing.assert_array_equal(focus_of_attention(parallel, start), start)


def test_applied_transform_and_scale_are_undone_by_map_back(tmp_path):
    cameras, a = ring(), 0.25
    applied = torch.tensor([[1.0, 0.0, 0.0, 0.3], [0.0, 0.0, 1.0, -0.2], [0.0, -1.0, 0.0, 0.1]])
    meta = transforms(cameras, applied_transform=applied.tolist(), applied_scale=a)
    capture = load(write_capture(tmp_path, meta), orientation="up", centre="poses")
    own = (cameras.positions / a - applied[:, 3]) @ applied[:, :3]  # x_listed = a (A x + b), solved for x
    torch.testing.assert_close(capture.map_back(capture.cameras.positions), own.double(), atol=1e-4, rtol=1e-5)


# --- boxes ---


def test_a_box_keeps_the_captures_frame_and_is_scaled_with_it(tmp_path):
    capture = load(write_capture(tmp_path, transforms(aabb=BOX)))
    scale = 1 / ring().positions.abs().max().item()
    assert capture.scale == pytest.approx(scale)
    assert not capture.unbounded
    torch.testing.assert_close(capture.transform, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(capture.aabb, scale * torch.tensor(BOX).reshape(6))
    assert load(tmp_path, unbounded="true").aabb.tolist() == [-1, -1, -1, 1, 1, 1]


def test_boxes_of_instant_ngp_and_of_nothing(tmp_path):
    small = load(write_capture(tmp_path / "1", transforms(aabb_scale=1)))
    assert not small.unbounded
    torch.testing.assert_close(small.aabb[3:], torch.full((3,), small.scale * 0.5 / 0.33))
    assert load(write_capture(tmp_path / "16", transforms(aabb_scale=16))).unbounded
    plain = write_capture(tmp_path / "plain", transforms())
    assert load(plain).unbounded
    assert not load(plain, unbounded=False).unbounded
    assert load(plain, unbounded="false").aabb.tolist() == [-1, -1, -1, 1, 1, 1]


# --- intrinsics ---


def only(meta, *keys):
    return {key: value for key, value in meta.items() if key in ("frames", *keys)}


def test_focal_lengths_from_angles_and_their_precedence(tmp_path):
    angle = 2 * math.atan(WIDTH / 2 / 20.0)
    meta = only(transforms()) | {"camera_angle_x": angle}
    meta["frames"][0] |= {"fl_x": 30.0, "cx": 1.0, "h": HEIGHT}
    meta["frames"][1] |= {"camera_angle_y": 2 * math.atan(HEIGHT / 2 / 25.0)}
    cameras = load(write_capture(tmp_path, meta)).cameras
    torch.testing.assert_close(cameras.fx, torch.tensor([30.0, 20.0] + [20.0] * 7))
    torch.testing.assert_close(cameras.fy, torch.tensor([30.0, 25.0] + [20.0] * 7))
    torch.testing.assert_close(cameras.cx, torch.tensor([1.0] + [WIDTH / 2] * 8))
    meta = transforms()  # a frame's own angle goes before a focal length given for all
    meta["frames"][2]["camera_angle_x"] = angle
    assert load(write_capture(tmp_path, meta)).cameras.fx[2].item() == pytest.approx(20.0)


def test_lens_coefficients_and_models(tmp_path):
    meta = transforms(k1=0.1, k2=-0.02, p1=0.001, p2=-0.002, k3=0.003, k4=0.0004, camera_model="OPENCV")
    meta["frames"][3]["k1"] = 0.05
    cameras = load(write_capture(tmp_path, meta)).cameras
    assert not cameras.fisheye
    expected = torch.tensor([0.1, -0.02, 0.003, 0.0004, 0.001, -0.002]).repeat(9, 1)
    expected[3, 0] = 0.05
    torch.testing.assert_close(cameras.distortion, expected)
    assert load(write_capture(tmp_path, transforms(k1=0))).cameras.distortion is None
    assert load(write_capture(tmp_path, transforms(camera_model="OPENCV_FISHEYE"))).cameras.fisheye
    assert load(write_capture(tmp_path, transforms(is_fisheye=True, k1=0.01))).cameras.fisheye
    meta = transforms()
    meta["frames"][2] |= {"camera_model": "OPENCV_FISHEYE", "k1": 0.01}
    mixed = load(write_capture(tmp_path, meta)).cameras
    assert mixed.fisheye.tolist() == [i == 2 for i in range(len(mixed))]


# --- splits and listing ---


def test_every_eighth_frame_in_order_of_names_is_held_out(tmp_path):
    meta = transforms(ring(20))
    for i, frame in enumerate(meta["frames"]):
        frame["file_path"] = f"images/r_{19 - i}.png"  # listed backwards, numbers of different lengths
    capture = load(write_capture(tmp_path, meta))
    assert capture.names == [f"images/r_{i}.png" for i in range(20)]
    assert capture.test.tolist() == [0, 8, 16]
    assert sorted(capture.train.tolist() + capture.test.tolist()) == list(range(20))
    torch.testing.assert_close(capture.images[0], torch.from_numpy(picture(19)).float() / 255)
    assert load(tmp_path, holdout_every=5).test.tolist() == [0, 5, 10, 15]


def test_own_splits(tmp_path):
    meta = transforms()
    for i, frame in enumerate(meta["frames"]):
        frame["split"] = "test" if i in (2, 5) else "train"
    assert load(write_capture(tmp_path / "a", meta)).test.tolist() == [2, 5]
    names = [frame["file_path"] for frame in meta["frames"]]
    meta = transforms(train_filenames=names[:4], test_filenames=["./" + names[6]])
    capture = load(write_capture(tmp_path / "b", meta))
    assert (capture.names, capture.test.tolist()) == ([*names[:4], names[6]], [4])
    capture = load(write_capture(tmp_path / "c", transforms(train_filenames=names[:4], val_filenames=names[7:])))
    assert capture.test.tolist() == [4, 5]


def test_blender_layout(tmp_path):
    angle = 2 * math.atan(WIDTH / 2 / 20.0)
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        meta = only(transforms(ring(count))) | {"camera_angle_x": angle}
        for i, frame in enumerate(meta["frames"]):
            frame["file_path"] = f"./{split}/r_{i}"
        write_capture(tmp_path, meta, f"transforms_{split}.json")
    capture = load(tmp_path)
    assert capture.names == [f"train/r_{i}" for i in range(4)] + [f"test/r_{i}" for i in range(3)]
    assert (capture.train.tolist(), capture.test.tolist()) == ([0, 1, 2, 3], [4, 5, 6])
    assert not capture.unbounded
    torch.testing.assert_close(capture.aabb[3:], torch.full((3,), 1.5 * capture.scale))
    torch.testing.assert_close(capture.cameras.fy, torch.full((7,), 20.0))
    alone = load(tmp_path / "transforms_train.json")
    assert len(alone.names) == 4
    (tmp_path / "transforms_test.json").unlink()
    assert load(tmp_path).names[4:] == ["val/r_0", "val/r_1"]


def test_missing_pictures_are_counted_in_one_warning(tmp_path, caplog):
    write_capture(tmp_path, transforms())
    for i in (1, 4):
        (tmp_path / f"images/{i:02d}.png").unlink()
    capture = load(tmp_path)
    assert len(capture.cameras) == len(capture.images) == 7
    torch.testing.assert_close(capture.images[1], torch.from_numpy(picture(2)).float() / 255)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert re.search(r"2 of 9 listed frames .*images/01\.png", warnings[0])


# --- pictures ---


def test_area_downscaling_is_the_exact_mean(tmp_path):
    capture = load(write_capture(tmp_path, transforms()), downscale=2)
    expected = torch.from_numpy(picture(0)).float().reshape(4, 2, 6, 2, 3).mean(dim=(1, 3)) / 255
    torch.testing.assert_close(capture.images[0], expected)
    assert (capture.cameras.width, capture.cameras.height) == (6, 4)
    torch.testing.assert_close(capture.cameras.fx, torch.full((9,), FOCAL / 2))
    ramp = np.linspace(0, 1, 10, dtype=np.float32)[None, :, None].repeat(4, axis=0)
    shrunk = area_resize(ramp, 3, 2)[0, :, 0]  # 10 pixels to 3: the third of the first is 3 + a third pixels
    np.testing.assert_allclose(shrunk[0], (0 + 1 + 2 + 3 / 3) / 9 / (10 / 3), rtol=1e-5)
    np.testing.assert_allclose(shrunk.mean(), ramp.mean(), rtol=1e-6)


def test_alpha_is_composited_over_the_background(tmp_path):
    write_capture(tmp_path, transforms())
    rgba = picture(5, channels=4)
    Image.fromarray(rgba).save(tmp_path / "images/00.png")
    values = torch.from_numpy(rgba).float() / 255
    white, black = load(tmp_path), load(tmp_path, background="black")
    torch.testing.assert_close(white.images[0], values[..., :3] * values[..., 3:] + 1 - values[..., 3:])
    torch.testing.assert_close(black.images[0], values[..., :3] * values[..., 3:])
    assert white.composited
    Image.fromarray(np.dstack((rgba[..., :3], np.full_like(rgba[..., 0], 255)))).save(tmp_path / "images/00.png")
    assert not load(tmp_path).composited  # opaque all over
    assert not load(write_capture(tmp_path, transforms())).composited


def test_grey_deep_and_palette_pictures(tmp_path):
    write_capture(tmp_path, transforms())
    deep = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "images/00.png")
    Image.fromarray(picture(1)[..., 0]).save(tmp_path / "images/01.png")
    Image.fromarray(picture(2)[..., :2], mode=None).convert("LA").save(tmp_path / "images/02.png")
    palette = Image.fromarray(picture(3) // 64 * 64).quantize(64)
    palette.save(tmp_path / "images/03.png")
    images = load(tmp_path).images
    torch.testing.assert_close(images[0], torch.from_numpy(deep / 65535).float()[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(images[1], torch.from_numpy(picture(1)[..., :1]).float().expand(-1, -1, 3) / 255)
    alpha = torch.from_numpy(picture(2)[..., 1:2]).float() / 255
    grey = torch.from_numpy(picture(2)[..., :1]).float() / 255 * alpha + 1 - alpha
    torch.testing.assert_close(images[2], grey.expand(-1, -1, 3))
    torch.testing.assert_close(images[3], torch.from_numpy(np.array(palette.convert("RGB"))).float() / 255)


def test_masks_are_usable_where_every_pixel_is(tmp_path):
    meta = transforms()
    meta["frames"][2]["mask_path"] = "masks/2.png"
    write_capture(tmp_path, meta)
    mask = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    mask[3, 5] = 0
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/2.png")
    full = load(tmp_path).masks
    assert full.sum() == full.numel() - 1
    assert not full[2, 3, 5]
    half = load(tmp_path, downscale=2).masks
    assert half.shape == (9, 4, 6)
    assert (~half).nonzero().tolist() == [[2, 1, 2]]
    assert load(write_capture(tmp_path / "none", transforms())).masks is None


def test_exif_orientation_counts_only_where_the_stated_size_says_so(tmp_path):
    tall = picture(0, width=HEIGHT, height=WIDTH)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    meta = transforms()
    for i, frame in enumerate(meta["frames"]):
        frame["file_path"] = f"{i}.png"
    write_capture(tmp_path, meta, pictures=False)
    for i in range(9):
        Image.fromarray(tall).save(tmp_path / f"{i}.png", exif=exif)
    expected = torch.from_numpy(np.rot90(tall, -1).copy()).float() / 255
    torch.testing.assert_close(load(tmp_path).images[0], expected)
    write_capture(tmp_path, only(meta, "fl_x"), pictures=False)  # no w, h: as stored
    torch.testing.assert_close(load(tmp_path).images[0], torch.from_numpy(tall).float() / 255)


# --- the fox ---


@pytest.fixture(scope="module")
def fox(shared_data):
    return load_capture(SceneConfig(str(shared_data / "fox"), downscale=2))


def test_fox_loads(fox, shared_data):
    assert fox.images.shape == (50, 240, 135, 3)
    assert fox.test.tolist() == list(range(0, 50, 8))
    assert fox.unbounded
    assert 0.2 < fox.images.mean() < 0.8
    meta = json.loads((shared_data / "fox/transforms.json").read_text())
    assert fox.cameras.fx[0].item() == pytest.approx(meta["fl_x"] / 2)
    stated = {frame["file_path"]: frame["transform_matrix"] for frame in meta["frames"]}
    positions = torch.tensor([[row[3] for row in stated[name][:3]] for name in fox.names])
    torch.testing.assert_close(fox.map_back(fox.cameras.positions), positions.double(), atol=1e-4, rtol=0)


def test_fox_is_upright_and_looked_at(fox):
    up = torch.nn.functional.normalize(fox.cameras.camera_to_world[:, :, 1].mean(0), dim=0)
    torch.testing.assert_close(up, torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    for index in range(50):  # the focus is in front of every camera and near the middle of its picture
        pixel, depth = fox.cameras.project(torch.zeros(1, 3), index)
        assert depth.item() > 0.3
        assert 0 < pixel[0, 0] < 135
        assert 0 < pixel[0, 1] < 240


def test_fox_pixels_agree_across_cameras(fox):
    """Neighbouring photographs of one point look alike: at the right depth a patch matches, at wrong ones it doesn't.

    For patches of frame 0 the depth is swept; the best one must match the photographs of frames 1 and 2 far better than
    the sweep's median does. Mixed-up axes, a wrong lens or mismatched poses leave no depth that does.
    """
    cameras = fox.cameras
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(120, 2, generator=generator) * torch.tensor([75.0, 160.0]) + torch.tensor([30.0, 40.0])
    offsets = torch.stack(torch.meshgrid(torch.arange(-4.0, 5), torch.arange(-4.0, 5), indexing="xy"), -1).reshape(
        -1, 2
    )
    pixels = centres[:, None] + offsets
    rays_o, rays_d = cameras.rays(torch.zeros(pixels[..., 0].numel(), dtype=torch.long), pixels.reshape(-1, 2))
    source = sample(fox.images[0], pixels.reshape(-1, 2)).reshape(120, 81, 3)
    contrast = source.std(dim=1).mean(dim=-1)
    errors = []
    for t in torch.linspace(0.3, 3.0, 60):
        both = [sample(fox.images[j], cameras.project(rays_o + t * rays_d, j)[0]) for j in (2, 4)]
        errors.append(sum((image.reshape(120, 81, 3) - source).abs().mean(dim=(1, 2)) for image in both) / 2)
    errors = torch.stack(errors)[:, contrast > contrast.median()]
    ratio = (errors.min(dim=0).values / errors.median(dim=0).values).median()
    assert ratio < 0.4


def sample(image, pixels):
    """Bilinear colours [R, 3] at pixels [R, 2]."""
    height, width = image.shape[:2]
    grid = pixels / torch.tensor([width, height]) * 2 - 1
    colours = torch.nn.functional.grid_sample(image.permute(2, 0, 1)[None], grid[None, None], align_corners=False)
    return colours[0, :, 0].T
