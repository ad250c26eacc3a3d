"""COLMAP's reconstructions, written by COLMAP itself: every lens projects as there, and malformed files are refused."""

import contextlib
import shutil
import struct

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from csd3d.datasets import SceneConfig, load_capture
from csd3d.datasets.framing import Layout, Place, Raster, frame_cameras
from csd3d.datasets.listing import find_reader, read_listing
from csd3d.datasets.readers.colmap import FOLDERS, MODELS, Colmap
from csd3d.errors import InputError

WIDTH, HEIGHT = 96, 64
LENSES = {
    "SIMPLE_PINHOLE": [80, 47, 33],
    "PINHOLE": [80, 85, 47, 33],
    "SIMPLE_RADIAL": [80, 47, 33, -0.1],
    "RADIAL": [80, 47, 33, -0.1, 0.03],
    "OPENCV": [80, 85, 47, 33, -0.1, 0.03, 0.002, -0.003],
    "OPENCV_FISHEYE": [80, 85, 47, 33, -0.05, 0.02, -0.004, 0.001],
    "FULL_OPENCV": [80, 85, 47, 33, -0.1, 0.03, 0.002, -0.003, 0.01, 0.05, -0.02, 0.004],
    "SIMPLE_RADIAL_FISHEYE": [80, 47, 33, -0.05],
    "RADIAL_FISHEYE": [80, 47, 33, -0.05, 0.02],
    "SIMPLE_FISHEYE": [80, 47, 33],
    "FISHEYE": [80, 85, 47, 33],
}


def reconstruction(model: str = "OPENCV", params=None) -> pycolmap.Reconstruction:
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.camera_width, options.camera_height = WIDTH, HEIGHT
    options.camera_model_id = getattr(pycolmap.CameraModelId, model)
    options.camera_params = LENSES[model] if params is None else params
    options.num_points3D, options.num_frames_per_rig, options.num_rigs = 40, 6, 1
    return pycolmap.synthesize_dataset(options)


def written(path, model: pycolmap.Reconstruction, suffix: str = ".bin", folder: str = "sparse/0"):
    """A capture with `model`, in COLMAP's binary or text files, and a picture for each of its images."""
    (path / folder).mkdir(parents=True)
    (model.write_binary if suffix == ".bin" else model.write_text)(str(path / folder))
    for i, image in enumerate(model.images.values()):
        file = path / "images" / image.name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 10 * i, np.uint8)).save(file)
    return path


@pytest.mark.parametrize("suffix", [".bin", ".txt"])
@pytest.mark.parametrize("model", LENSES)
def test_every_lens_projects_as_in_colmap(tmp_path, model, suffix):
    truth = reconstruction(model)
    listing = read_listing(written(tmp_path, truth, suffix))
    assert len(listing.frames) == len(truth.images) == 6
    poses = torch.from_numpy(np.stack([frame.pose for frame in listing.frames]))[:, :3]
    count = len(listing.frames)
    layout = Layout(WIDTH, HEIGHT, [Raster(WIDTH, HEIGHT, False)] * count, [Place(0, 0, WIDTH, HEIGHT)] * count)
    cameras = frame_cameras(listing.frames, layout, poses.float())
    seen = 0
    for i, frame in enumerate(listing.frames):
        image = truth.find_image_with_name(frame.name)
        points = [(p.xy, truth.points3D[p.point3D_id].xyz) for p in image.points2D if p.has_point3D()]
        pixels, xyz = (torch.from_numpy(np.array(part)).float() for part in zip(*points, strict=True))
        found, depth = cameras.project(xyz, i)
        torch.testing.assert_close(found, pixels, atol=2e-2, rtol=0)
        assert (depth > 0).all()
        seen += len(points)
    assert seen > 40
    expected = {tuple(np.round(point.xyz, 6)) for point in truth.points3D.values()}
    assert {tuple(row) for row in np.round(listing.points.xyz, 6)} == expected
    assert listing.points.rgb.max() <= 1


def test_the_models_are_those_of_colmap_and_others_are_refused(tmp_path):
    for number, (name, *_) in enumerate(MODELS):
        assert pycolmap.CameraModelId(number).name == name
    refused = {name for name, _, keys in MODELS if "?" in keys}
    assert refused | set(LENSES) == {name for name, *_ in MODELS}
    for i, name in enumerate(sorted(refused - {"EQUIRECTANGULAR"})):
        model = reconstruction("PINHOLE")
        folder = written(tmp_path / str(i), model, ".txt")
        count = len(pycolmap.Camera.create_from_model_id(1, getattr(pycolmap.CameraModelId, name), 80, 96, 64).params)
        line = f"1 {name} 96 64 80 80 48 32 {'0.01 ' * (count - 4)}"
        (folder / "sparse/0/cameras.txt").write_text(line)
        with pytest.raises(InputError, match=rf"cameras.txt: camera 1: camera model {name} .*image_undistorter"):
            read_listing(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_usual_folders_are_found_and_a_json_goes_first(tmp_path, folder):
    capture = written(tmp_path / "c", reconstruction(), folder=folder)
    assert isinstance(find_reader(capture), Colmap)
    (capture / "transforms.json").write_text("{}")
    assert not isinstance(find_reader(capture), Colmap)


def test_a_capture_is_loaded_with_its_pictures_and_points(tmp_path):
    model = reconstruction("PINHOLE")
    capture = load_capture(SceneConfig(str(written(tmp_path, model))))
    assert capture.images.shape == (6, HEIGHT, WIDTH, 3)
    for i, name in enumerate(capture.names):
        truth = model.find_image_with_name(name)
        own = capture.map_back(capture.cameras.positions[i : i + 1].double())
        np.testing.assert_allclose(own[0], truth.projection_center(), atol=1e-4)
    assert len(capture.points.xyz) == len(model.points3D)


# --- malformed files ---


def refusal(folder) -> str:
    with pytest.raises(InputError) as caught:
        read_listing(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, name):
    capture = written(tmp_path, reconstruction())
    file = capture / "sparse/0" / f"{name}.bin"
    whole = file.read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{name}.bin" in refusal(capture)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("count", [2**63, 2**40, 10**6])
def test_a_huge_count_is_refused_before_memory_is_taken(tmp_path, name, count):
    capture = written(tmp_path, reconstruction())
    file = capture / "sparse/0" / f"{name}.bin"
    file.write_bytes(struct.pack("<Q", count) + file.read_bytes()[8:])
    assert "do not fit" in refusal(capture)


def test_flipped_bytes_are_read_or_refused(tmp_path):
    capture = written(tmp_path, reconstruction())
    rng = np.random.default_rng(0)
    for name in ("cameras", "images", "points3D"):
        file = capture / "sparse/0" / f"{name}.bin"
        whole = file.read_bytes()
        for _ in range(100):
            spoiled = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), 3):
                spoiled[place] = rng.integers(0, 256)
            file.write_bytes(spoiled)
            with contextlib.suppress(InputError):
                read_listing(capture)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cameras", "1 PINHOLE 96 64 80 80 48"),
        ("cameras", "1 PINHOLE 96 64 80 80 48 nan"),
        ("cameras", "1 PINHOLE 96 64 -80 80 48 32"),
        ("cameras", "1 NONSENSE 96 64 80"),
        ("cameras", "1 PINHOLE wide 64 80 80 48 32"),
        ("cameras", "2 PINHOLE 96 64 80 80 48 32"),  # not the images' camera
        ("images", ""),
        ("images", "1 0 0 0 0 0 0 0 1 a.png\n\n"),
        ("images", "1 1 0 0 0 0 inf 0 1 a.png\n\n"),
        ("images", "1 1 0 0 0 0 0 0 1 ../../a.png\n\n"),
        ("images", "1 1 0 0\n\n"),
        ("images", "1 1 0 0 0 0 0 0 1 a.png\n2 1 0 0 0 0 0 1 1 b.png\n"),  # without lines of features
        ("images", "1 1 0 0 0 0 0 0 1 a.png\n1 2\n"),
        ("points3D", "1 0 0\n"),
        ("points3D", "1 0 0 nan 1 2 3 0.1\n"),
    ],
)
def test_malformed_text_is_refused_in_one_line(tmp_path, name, text):
    capture = written(tmp_path, reconstruction("PINHOLE"), ".txt")
    (capture / "sparse/0" / f"{name}.txt").write_text(text)
    assert f"{name}.txt" in refusal(capture) or name == "cameras"


def test_text_without_features_and_names_with_spaces(tmp_path):
    capture = written(tmp_path, reconstruction("PINHOLE"), ".txt")
    shutil.copy(next((capture / "images").rglob("*.png")), capture / "images" / "a b.png")
    (capture / "sparse/0/images.txt").write_text("# a comment\n1 1 0 0 0 0.5 0 2 1 a b.png\n\n\n\n")
    (frame,) = read_listing(capture).frames
    assert frame.name == "a b.png"
    np.testing.assert_allclose(frame.pose[:3, 3], [-0.5, 0, -2])
    np.testing.assert_allclose(frame.pose[:3, :3], np.diag([1, -1, -1]))
