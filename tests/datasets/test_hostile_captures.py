"""Captures as they should not be: each is one InputError of one line that names the file and the key."""

import copy
import io
import json
import math
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_captures import HEIGHT, WIDTH, picture, ring, transforms, write_capture

from csd3d.datasets import SceneConfig, load_capture
from csd3d.errors import InputError


def refusal(folder, **config) -> str:
    """The message of the InputError that loading raises; one line."""
    with pytest.raises(InputError) as caught:
        load_capture(SceneConfig(str(folder), **config))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def spoiled(change) -> dict:
    meta = transforms()
    change(meta, meta["frames"][3])
    return meta


# --- JSON ---

BAD_JSON = {
    "empty": b"",
    "cut": b'{"frames": [',
    "not_an_object": b"[1, 2]",
    "null": b"null",
    "binary": bytes(range(256)),
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "long_number": b'{"fl_x": ' + b"9" * 10_000 + b"}",
    "twice": b'{"frames": [], "frames": []}',
    "no_frames": b"{}",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_malformed_json(tmp_path, content):
    (tmp_path / "transforms.json").write_bytes(content)
    assert str(tmp_path / "transforms.json") in refusal(tmp_path)
    refusal(tmp_path / "transforms.json")


def test_json_files_that_are_missing_too_large_or_no_files(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "transforms.json" in refusal(tmp_path)
    for path in ("", " ", "x" * 5000, "~nobody_of_this_name/x"):
        assert "scene.path" in refusal(path)
    (tmp_path / "transforms.json").mkdir()
    assert "not a file" in refusal(tmp_path)
    large = write_capture(tmp_path / "large", transforms())
    os.truncate(large / "transforms.json", 2**25 + 1)
    assert "33554433 bytes" in refusal(large)


# --- keys ---

NAN, INF = float("nan"), float("inf")
SPOILED = {  # what is changed -> what the message must name
    "frames_object": (lambda m, f: m.update(frames={"0": f}), "frames"),
    "frames_none": (lambda m, f: m.update(frames=[]), "frames"),
    "frame_number": (lambda m, f: m["frames"].insert(3, 5), "frames[3]"),
    "no_file_path": (lambda m, f: f.pop("file_path"), "frames[3]"),
    "file_path_number": (lambda m, f: f.update(file_path=3), "frames[3].file_path"),
    "file_path_empty": (lambda m, f: f.update(file_path=" "), "frames[3].file_path"),
    "file_path_nul": (lambda m, f: f.update(file_path="a\0b.png"), "frames[3].file_path"),
    "file_path_two_lines": (lambda m, f: f.update(file_path="a\nb.png"), "frames[3].file_path"),
    "file_path_surrogate": (lambda m, f: f.update(file_path="\ud800.png"), "frames[3].file_path"),
    "file_path_long": (lambda m, f: f.update(file_path="x" * 5000), "frames[3].file_path"),
    "file_path_parent": (lambda m, f: f.update(file_path="../images/03.png"), "frames[3].file_path"),
    "file_path_absolute": (lambda m, f: f.update(file_path="/etc/passwd"), "frames[3].file_path"),
    "file_path_twice": (lambda m, f: f.update(file_path="images/../images/02.png"), "frames[3].file_path"),
    "mask_parent": (lambda m, f: f.update(mask_path="../../m.png"), "frames[3].mask_path"),
    "no_matrix": (lambda m, f: f.pop("transform_matrix"), "transform_matrix"),
    "matrix_text": (lambda m, f: f.update(transform_matrix="identity"), "frames[3].transform_matrix"),
    "matrix_flat": (lambda m, f: f.update(transform_matrix=[1.0] * 16), "frames[3].transform_matrix"),
    "matrix_3x3": (lambda m, f: f.update(transform_matrix=[[1, 0, 0], [0, 1, 0], [0, 0, 1]]), "3x4 or 4x4"),
    "matrix_ragged": (lambda m, f: f["transform_matrix"][1].pop(), "frames[3].transform_matrix"),
    "matrix_bool": (lambda m, f: set_entry(f, 0, 0, True), "frames[3].transform_matrix[0][0]"),
    "matrix_string": (lambda m, f: set_entry(f, 1, 2, "0.5"), "frames[3].transform_matrix[1][2]"),
    "matrix_null": (lambda m, f: set_entry(f, 1, 3, None), "frames[3].transform_matrix[1][3]"),
    "matrix_nan": (lambda m, f: set_entry(f, 2, 1, NAN), "frames[3].transform_matrix[2][1]"),
    "matrix_inf": (lambda m, f: set_entry(f, 2, 3, -INF), "frames[3].transform_matrix[2][3]"),
    "matrix_huge": (lambda m, f: set_entry(f, 2, 3, 1e300), "frames[3].transform_matrix"),
    "matrix_huge_int": (lambda m, f: set_entry(f, 2, 3, 10**400), "frames[3].transform_matrix[2][3]"),
    "matrix_last_row": (lambda m, f: set_entry(f, 3, 0, 0.5), "last row"),
    "singular": (lambda m, f: f["transform_matrix"].__setitem__(0, [0, 0, 0, 1]), "no rotation"),
    "scaled_to_nothing": (lambda m, f: scale_columns(f, (1e-9, 1e-9, 1e-9)), "no rotation"),
    "sheared": (lambda m, f: scale_columns(f, (1, 1.1, 1)), "no rotation"),
    "mirrored": (lambda m, f: scale_columns(f, (-1, 1, 1)), "mirrored"),
    "focal_zero": (lambda m, f: m.update(fl_x=0), "fl_x"),
    "focal_negative": (lambda m, f: f.update(fl_y=-10.0), "frames[3].fl_y"),
    "focal_nan": (lambda m, f: f.update(fl_x=NAN), "frames[3].fl_x"),
    "focal_inf": (lambda m, f: f.update(fl_x=INF), "frames[3].fl_x"),
    "focal_tiny": (lambda m, f: f.update(fl_x=1e-300), "frames[3].fl_x"),
    "focal_text": (lambda m, f: f.update(fl_x="10"), "frames[3].fl_x"),
    "focal_none": (lambda m, f: [m.pop("fl_x"), m.pop("fl_y")], "camera_angle_x"),
    "angle_wide": (lambda m, f: f.update(camera_angle_x=math.pi), "camera_angle_x"),
    "angle_negative": (lambda m, f: f.update(camera_angle_x=-0.5), "camera_angle_x"),
    "centre_nan": (lambda m, f: f.update(cx=NAN), "frames[3].cx"),
    "centre_far": (lambda m, f: f.update(cy=1e30), "cy"),
    "width_zero": (lambda m, f: m.update(w=0), ".w"),
    "width_fraction": (lambda m, f: m.update(w=12.5), ".w"),
    "width_wrong": (lambda m, f: m.update(w=WIDTH + 1), f"{WIDTH}x{HEIGHT}"),
    "height_list": (lambda m, f: m.update(h=[HEIGHT]), ".h"),
    "lens_text": (lambda m, f: m.update(k1="a"), "k1"),
    "lens_inf": (lambda m, f: f.update(p2=INF), "frames[3].p2"),
    "lens_huge": (lambda m, f: f.update(k2=1e200), "frames[3].k2"),
    "lens_wild": (lambda m, f: f.update(k1=-9e3, k2=4e3), "frames[3]"),
    "model_unknown": (lambda m, f: m.update(camera_model="FISHEYE624"), "OPENCV_FISHEYE"),
    "model_number": (lambda m, f: m.update(camera_model=3), "camera_model"),
    "split_unknown": (lambda m, f: f.update(split="dev"), "frames[3].split"),
    "split_list": (lambda m, f: f.update(split=["train"]), "frames[3].split"),
    "split_all_test": (lambda m, f: [x.update(split="test") for x in m["frames"]], "train"),
    "filenames_text": (lambda m, f: m.update(train_filenames="a"), "train_filenames"),
    "filenames_unknown": (lambda m, f: m.update(train_filenames=["a.png"]), "a.png"),
    "filenames_both": (
        lambda m, f: m.update(train_filenames=["images/01.png"], test_filenames=["images/01.png"]),
        "test_filenames",
    ),
    "filenames_empty": (lambda m, f: m.update(train_filenames=[]), "frame"),
    "aabb_flat": (lambda m, f: m.update(aabb=[0, 0, 0, 1, 1, 1]), "aabb"),
    "aabb_inverted": (lambda m, f: m.update(aabb=[[1, 1, 1], [0, 2, 2]]), "aabb"),
    "aabb_nan": (lambda m, f: m.update(aabb=[[NAN, 0, 0], [1, 1, 1]]), "aabb[0][0]"),
    "aabb_scale_zero": (lambda m, f: m.update(aabb_scale=0), "aabb_scale"),
    "applied_scaled": (lambda m, f: m.update(applied_transform=[[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), "applied_"),
    "applied_scale": (lambda m, f: m.update(applied_scale=-1), "applied_scale"),
}


def set_entry(frame, i, j, value):
    frame["transform_matrix"][i][j] = value


def scale_columns(frame, factors):
    for row in frame["transform_matrix"][:3]:
        row[:3] = [x * factor for x, factor in zip(row, factors, strict=False)]


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_values(tmp_path, name):
    change, named = SPOILED[name]
    folder = write_capture(tmp_path / "set", transforms())
    (folder / "transforms.json").write_text(json.dumps(spoiled(change)))
    message = refusal(folder)
    assert named in message
    assert "transforms.json" in message


def test_poses_printed_with_four_digits_are_accepted_and_made_rigid(tmp_path):
    meta = transforms()
    for frame in meta["frames"]:
        frame["transform_matrix"] = [[round(x, 4) for x in row] for row in frame["transform_matrix"][:3]]
    rotation = load_capture(SceneConfig(str(write_capture(tmp_path, meta)))).cameras.camera_to_world[:, :, :3]
    assert (rotation.mT @ rotation - rotation.new_ones(3).diag()).abs().max() < 1e-6


# --- files ---


def test_links_that_leave_the_folder(tmp_path):
    folder = write_capture(tmp_path / "set", transforms())
    Image.fromarray(picture(0)).save(tmp_path / "secret.png")
    (folder / "images/03.png").unlink()
    (folder / "images/03.png").symlink_to(tmp_path / "secret.png")
    assert "frames[3].file_path" in refusal(folder)
    (folder / "images/03.png").unlink()
    (folder / "images/03.png").symlink_to(tmp_path / "not_there.png")  # leads out, to nothing
    assert "frames[3].file_path" in refusal(folder)
    (folder / "images/03.png").unlink()
    (folder / "images/03.png").symlink_to("04.png")  # stays inside, but is then listed twice
    assert "listed already" in refusal(folder)
    (tmp_path / "alias").symlink_to(write_capture(tmp_path / "fine", transforms()))
    assert len(load_capture(SceneConfig(str(tmp_path / "alias"))).names) == 9  # the folder itself may be a link


def test_no_picture_at_all(tmp_path):
    message = refusal(write_capture(tmp_path, transforms(), pictures=False))
    assert "images/00.png" in message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(0, width=200, height=200)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 8\n", b"\x89PNG\r\n\x1a\n", bytes(100)],
)
def test_files_that_are_no_pictures(tmp_path, content):
    folder = write_capture(tmp_path, transforms())
    (folder / "images/03.png").write_bytes(content)
    assert "03.png" in refusal(folder)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated_pictures(tmp_path, kind, part):
    meta = transforms(w=200, h=200)
    meta["frames"] = meta["frames"][:1]
    folder = write_capture(tmp_path, meta)
    data = encoded(kind)
    (folder / "images/00.png").write_bytes(data)
    load_capture(SceneConfig(str(folder)))  # whole, it is fine
    (folder / "images/00.png").write_bytes(data[: int(part * len(data))])
    assert "00.png" in refusal(folder)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_png_bombs_are_refused_by_their_header(tmp_path, width, height):
    folder = write_capture(tmp_path, transforms())
    (folder / "images/03.png").write_bytes(png_bomb(width, height))
    assert "03.png" in refusal(folder)


def test_limits_on_pixels_and_memory(tmp_path, monkeypatch):
    folder = write_capture(tmp_path, transforms())
    assert "max_pixels" in refusal(folder, max_pixels=WIDTH * HEIGHT - 1)

    def decode(*_):
        raise AssertionError("decoded before the limit was checked")

    monkeypatch.setattr("csd3d.datasets.capture.decode", decode)
    message = refusal(folder, max_memory_gib=9 * WIDTH * HEIGHT * 12 / 2**30 * 0.99)
    assert "max_memory_gib" in message
    assert "downscale" in message
    assert "take 0" not in message  # small sizes have digits too
    assert "iB, the limit is " in message


def test_pictures_of_another_shape_than_stated(tmp_path):
    folder = write_capture(tmp_path, transforms())
    Image.fromarray(picture(0, width=WIDTH * 2)).save(folder / "images/03.png")
    assert f"is displayed as {WIDTH * 2}x{HEIGHT}" in refusal(folder)
    Image.fromarray(picture(0, width=HEIGHT, height=WIDTH)).save(folder / "images/03.png")
    assert "frames[3]" in refusal(folder)


def test_a_mask_of_another_shape_and_a_missing_one(tmp_path, caplog):
    meta = transforms()
    meta["frames"][3]["mask_path"] = "m.png"
    folder = write_capture(tmp_path, meta)
    assert len(load_capture(SceneConfig(str(folder))).names) == 8
    assert "1 of 9" in caplog.text
    Image.fromarray(picture(0, width=WIDTH * 2)).save(folder / "m.png")
    assert "frames[3].mask_path" in refusal(folder)


def test_a_picture_of_too_many_bytes_is_refused_unopened(tmp_path, monkeypatch):
    folder = write_capture(tmp_path, transforms())
    with (folder / "images/03.png").open("r+b") as file:
        file.truncate(2**32)  # sparse
    monkeypatch.setattr("csd3d.datasets.images.opened", lambda path: pytest.fail(f"{path} was opened first"))
    (folder / "images/00.png").unlink()
    (folder / "images/03.png").rename(folder / "images/00.png")
    message = refusal(folder)
    assert "4294967296 bytes" in message
    assert "scene.max_pixels" in message


def test_fifty_thousand_frames_alike_are_told_quickly(tmp_path):
    meta = transforms(ring(1))
    entry = json.dumps(meta["frames"][0])
    (tmp_path / "transforms.json").write_text('{"fl_x": 10, "frames": [' + ",".join([entry] * 50_000) + "]}")
    start = time.perf_counter()
    assert "frames[1].file_path: 'images/00.png' is listed already, by frames[0]" in refusal(tmp_path)
    assert time.perf_counter() - start < 5


def test_train_and_test_of_blender_may_not_share_pictures(tmp_path):
    meta = transforms(ring(3))
    write_capture(tmp_path, meta, "transforms_train.json")
    write_capture(tmp_path, meta, "transforms_test.json")
    assert "listed already" in refusal(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"orientation": "down"},
        {"centre": "middle"},
        {"unbounded": "maybe"},
        {"background": "plaid"},
        {"downscale": 0.5},
        {"downscale": NAN},
        {"holdout_every": 1},
        {"holdout_every": -3},
        {"max_pixels": 0},
        {"max_memory_gib": NAN},
    ],
)
def test_config_values(config):
    with pytest.raises(InputError, match=next(iter(config))):
        SceneConfig("x", **config)


# --- anything at all ---

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["../x", "/", "OPENCV"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
KEYS = [
    "fl_x",
    "fl_y",
    "cx",
    "cy",
    "w",
    "h",
    "camera_angle_x",
    "camera_angle_y",
    "k1",
    "k2",
    "k3",
    "k4",
    "p1",
    "p2",
    "camera_model",
    "is_fisheye",
    "aabb",
    "aabb_scale",
    "split",
    "applied_transform",
    "applied_scale",
    "train_filenames",
    "val_filenames",
    "file_path",
    "mask_path",
    "transform_matrix",
    "frames",
]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def loads_or_refuses(folder) -> None:
    capture, message = None, ""
    try:
        capture = load_capture(SceneConfig(str(folder)))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    if capture is None:
        return
    rays_o, rays_d = capture.cameras.image_rays(0)
    for tensor in (capture.cameras.camera_to_world, capture.transform, capture.aabb, capture.images, rays_o, rays_d):
        assert tensor.isfinite().all()
    assert (capture.aabb[3:] > capture.aabb[:3]).all()


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), ANYTHING, max_size=6))
def test_any_json_loads_or_is_refused(meta):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "transforms.json").write_text(json.dumps(meta))
        loads_or_refuses(folder)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return write_capture(tmp_path_factory.mktemp("valid"), transforms(ring(3)))


@FUZZ
@given(in_frame=st.booleans(), key=st.sampled_from(KEYS), value=ANYTHING | st.floats(-1e3, 1e3) | st.integers(-9, 99))
def test_one_key_of_a_valid_capture_replaced_by_anything(valid, in_frame, key, value):
    meta = transforms(ring(3))
    (meta["frames"][1] if in_frame else meta)[key] = copy.deepcopy(value)
    (valid / "transforms.json").write_text(json.dumps(meta))
    loads_or_refuses(valid)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
def test_a_picture_with_damaged_bytes_loads_or_is_refused(valid, damage, jpeg):
    (valid / "transforms.json").write_text(json.dumps(transforms(ring(3))))
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "JPEG" if jpeg else "PNG")
    data = bytearray(buffer.getvalue())
    for place, byte in damage:
        data[place % len(data)] = byte
    (valid / "images/00.png").write_bytes(data)
    loads_or_refuses(valid)
    Image.fromarray(picture(0)).save(valid / "images/00.png")
