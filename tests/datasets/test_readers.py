"""Readers: found by what a folder holds, chosen by name, brought by somebody else."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_captures import FOCAL, HEIGHT, WIDTH, ring, transforms, write_capture

from csd3d import registry
from csd3d.config import load_config
from csd3d.datasets import SceneConfig, load_capture
from csd3d.datasets.listing import Frame, Listing, Points, find_reader, read_listing
from csd3d.errors import InputError
from csd3d.schema import Chosen, choose


@dataclass(frozen=True)
class Poses:
    """Pictures beside a poses.npy [B, 3, 4]: a whole format in one file, with a key of its own and sparse points."""

    images: str = "images"  # the folder of the pictures

    wants: ClassVar[str] = "poses.npy"

    @staticmethod
    def matches(path: Path) -> bool:
        return (path / "poses.npy").exists()

    def read(self, path: Path) -> Listing:
        files = sorted((path / self.images).iterdir())
        poses = np.concatenate((np.load(path / "poses.npy"), np.tile([[[0, 0, 0, 1.0]]], (len(files), 1, 1))), 1)
        frames = [
            Frame(f"{path}/poses.npy[{i}]", file.name, file, pose, focal=(FOCAL, None), size=(WIDTH, HEIGHT))
            for i, (file, pose) in enumerate(zip(files, poses, strict=True))
        ]
        points = Points(np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), np.ones((2, 3), np.float32))
        return Listing(frames, path, path / "poses.npy", points=points)


@pytest.fixture
def poses_reader(monkeypatch):
    registry.names("reader")
    monkeypatch.setitem(registry._entries, "reader", dict(registry._entries["reader"]))
    registry.register("reader", "poses", title="Poses in an array")(Poses)


@pytest.fixture
def folder(tmp_path):
    """The same capture for nerfstudio's reader and, beside it, for the one above."""
    write_capture(tmp_path / "both", transforms())
    np.save(tmp_path / "both" / "poses.npy", ring().camera_to_world.numpy().astype(np.float64))
    return tmp_path / "both"


def test_each_layout_has_its_reader(tmp_path):
    json_file = write_capture(tmp_path / "n", transforms()) / "transforms.json"
    write_capture(tmp_path / "b", transforms(), "transforms_train.json")
    assert {type(find_reader(path)).__name__ for path in (tmp_path / "n", json_file)} == {"Nerfstudio"}
    for path in (tmp_path / "b", tmp_path / "b" / "transforms_train.json"):
        assert type(find_reader(path)).__name__ == "Blender"
    write_capture(tmp_path / "b", transforms())  # both layouts: transforms.json goes first
    assert type(find_reader(tmp_path / "b")).__name__ == "Nerfstudio"


def test_what_no_reader_knows_is_told_with_what_they_look_for(tmp_path):
    with pytest.raises(InputError, match=r"transforms.json \(nerfstudio.*transforms_train.json \(Blender"):
        load_capture(SceneConfig(str(tmp_path)))


def test_another_reader_brings_the_same_capture(folder, poses_reader):
    reference = load_capture(SceneConfig(str(folder), choose("reader", "nerfstudio")))
    found = load_capture(SceneConfig(str(folder), choose("reader", "poses")))
    assert (found.reader, reference.reader) == ("Poses in an array", "nerfstudio and instant-ngp")
    assert torch.equal(found.images, reference.images)
    assert torch.allclose(found.cameras.camera_to_world, reference.cameras.camera_to_world, atol=1e-6)


def test_its_points_are_in_the_normalised_frame(folder, poses_reader):
    found = load_capture(SceneConfig(str(folder), choose("reader", "poses")))
    assert np.allclose(found.map_back(torch.from_numpy(found.points.xyz)), [[0, 0, 0], [1, 2, 3]])


def spoilt(change):
    """The reader above, with `change` made to what it lists."""

    class Spoilt(Poses):
        def read(self, path):
            return change(super().read(path))

    return Spoilt()


def turned(listing, factor):
    pose = listing.frames[1].pose.copy()
    pose[:3, :3] *= factor
    return replace(listing, frames=[listing.frames[0], replace(listing.frames[1], pose=pose), *listing.frames[2:]])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: Frame("here"), r"Spoilt cannot read it \(TypeError: .*Frame"),
        (lambda x: x.frames, "read returned a list; expected a Listing"),
        (lambda x: replace(x, frames=[None]), "frames holds a NoneType; expected Frame"),
        (lambda x: replace(x, points=[[0, 0, 0]]), r"points is a list; expected Points\(xyz"),
        (
            lambda x: replace(x, points=Points([[0, 0, 0]], [[1, 1, 1]])),
            "points has a list and a list; expected arrays",
        ),
        (lambda x: replace(x, box=np.zeros(6)), r"box is a ndarray \[6\] of float64; expected an array \[2, 3\]"),
        (
            lambda x: replace(x, frames=[replace(x.frames[0], pose=np.eye(3))]),
            r"poses.npy\[0\]: pose is a ndarray \[3, 3\]",
        ),
        (lambda x: turned(x, 1.1), r"poses.npy\[1\]: pose: its 3x3 part is scaled by 1.1"),
        (lambda x: turned(x, -1.0), r"poses.npy\[1\]: pose: its 3x3 part is mirrored"),
        (lambda x: turned(x, np.nan), r"poses.npy\[1\]: pose: holds numbers that are not finite"),
    ],
)
def test_what_a_reader_returns_is_checked(folder, change, said):
    with pytest.raises(InputError, match=said) as error:
        read_listing(folder, spoilt(change))
    assert "\n" not in str(error.value)


def test_a_pose_of_three_digits_is_made_rigid_and_an_exact_one_left_alone(folder):
    exact = Poses().read(folder).frames[1].pose
    listing = read_listing(folder, spoilt(lambda x: turned(x, 1.001)))
    assert np.allclose(listing.frames[1].pose, exact, rtol=0, atol=1e-6)


def test_a_folder_that_several_know_needs_a_choice(folder, poses_reader):
    with pytest.raises(InputError, match=r"nerfstudio, poses.*scene.reader"):
        load_capture(SceneConfig(str(folder)))


def test_a_reader_has_keys_of_its_own(folder, poses_reader, tmp_path):
    (folder / "images").rename(folder / "photos")
    (tmp_path / "c.yaml").write_text(f"path: {folder}\nreader: {{type: poses, images: photos}}")
    config = load_config(tmp_path / "c.yaml", [], SceneConfig)
    assert config.reader == Chosen("poses", Poses("photos"))
    assert len(load_capture(config).names) == 9
    (tmp_path / "c.yaml").write_text(f"path: {folder}\nreader: pses")
    with pytest.raises(InputError, match="did you mean poses"):
        load_config(tmp_path / "c.yaml", [], SceneConfig)
