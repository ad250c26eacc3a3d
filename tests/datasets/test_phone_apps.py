"""Polycam's and Record3D's raw folders: the same capture as nerfstudio's JSON of it."""

import json

import numpy as np
import pytest
import torch
from tiny_captures import polycam, record3d, save, transforms, write_capture

from csd3d.datasets import SceneConfig, load_capture
from csd3d.datasets.listing import find_reader
from csd3d.errors import InputError


def reference(folder):
    meta = transforms(cx=5.5, cy=4.5)
    for i, frame in enumerate(meta["frames"]):
        frame["file_path"] = f"images/{i:02d}.jpg"
    write_capture(folder, meta, pictures=False)
    for i in range(len(meta["frames"])):
        save(folder / f"images/{i:02d}.jpg", i)
    return load_capture(SceneConfig(str(folder)))


@pytest.mark.parametrize("make", [polycam, record3d])
def test_it_is_the_same_capture_as_nerfstudios(tmp_path, make):
    found, expected = load_capture(SceneConfig(str(make(tmp_path / "app")))), reference(tmp_path / "json")
    assert torch.equal(found.images, expected.images)
    for name in ("camera_to_world", "fx", "fy", "cx", "cy"):
        torch.testing.assert_close(getattr(found.cameras, name), getattr(expected.cameras, name), atol=1e-5, rtol=1e-5)


def test_polycams_corrected_poses_go_first(tmp_path):
    polycam(tmp_path)
    polycam(tmp_path, "corrected_", shift=2.0)
    reader = find_reader(tmp_path)
    frames, raw = reader.read(tmp_path).frames, type(reader)(corrected=False).read(tmp_path).frames
    np.testing.assert_allclose(frames[0].pose[:3, 3], raw[0].pose[:3, 3] + 2)
    assert frames[0].file.parent.name == "corrected_images"
    assert raw[0].file.parent.name == "images"


def test_every_third_frame_of_record3d(tmp_path):
    reader = type(find_reader(record3d(tmp_path)))
    assert [frame.name for frame in reader(every=3).read(tmp_path).frames] == ["rgbd/0", "rgbd/3", "rgbd/6"]


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("poses"),
        lambda said: said.update(poses=[]),
        lambda said: said.update(K=[1, 2]),
        lambda said: said["poses"].__setitem__(2, [0, 0, 0, 0, 0, 0, 0]),
        lambda said: said["poses"].__setitem__(2, [0, 0, 0, 1, 0, 0]),
        lambda said: said["poses"].__setitem__(2, [0, 0, 0, 1, 0, 0, 1e9]),
        lambda said: said["K"].__setitem__(0, 0),
    ],
)
def test_malformed_metadata_is_refused_in_one_line(tmp_path, change):
    said = json.loads((record3d(tmp_path) / "metadata").read_text())
    change(said)
    (tmp_path / "metadata").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"metadata: [^\n]*$"):
        load_capture(SceneConfig(str(tmp_path)))


@pytest.mark.parametrize("change", [{"t_00": 3.0}, {"fx": 0}, {"width": "wide"}, {"cx": None}, {"t_13": 1e300}])
def test_malformed_polycam_cameras_are_refused_in_one_line(tmp_path, change):
    file = polycam(tmp_path) / "keyframes/cameras/1003.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=r"1003.json: [^\n]*$"):
        load_capture(SceneConfig(str(tmp_path)))
    file.write_text("{}")
    with pytest.raises(InputError, match=r"1003.json: has no t_00"):
        load_capture(SceneConfig(str(tmp_path)))
