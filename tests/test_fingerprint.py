"""Fingerprints: of content alone, of all of it, and the same wherever it is."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from csd3d import fingerprint
from csd3d.canvas.clip import contents_of
from csd3d.errors import InputError
from csd3d.fingerprint import of_file, of_files, of_path, of_value


def test_a_file_is_its_content_not_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/other.png").write_bytes(b"one")
    assert of_path(str(tmp_path / "a.png")) == of_path(str(tmp_path / "b/other.png"))
    (tmp_path / "a.png").write_bytes(b"two")
    assert of_path(str(tmp_path / "a.png")) != of_path(str(tmp_path / "b/other.png"))
    assert of_file(tmp_path / "b/other.png") == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_a_folder_is_the_names_and_content_of_its_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet/w.bin").write_bytes(b"1")
    first, second = (of_path(str(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    (tmp_path / "a/.DS_Store").write_bytes(b"x")
    (tmp_path / "a/run").mkdir()
    for name in ("config.yaml", "cmd.txt"):  # a run inside its own input
        (tmp_path / "a/run" / name).write_text("")
    assert of_path(str(tmp_path / "a")) == first
    (tmp_path / "a/unet/w.bin").rename(tmp_path / "a/unet/v.bin")
    assert of_path(str(tmp_path / "a")) != first


def test_what_is_no_file_stands_for_itself():
    assert of_path("timbrooks/instruct-pix2pix") == "timbrooks/instruct-pix2pix"
    assert of_path("") == ""


def test_files_that_cannot_be_hashed_are_bad_input(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to(tmp_path)
    for name in ("loop", "fifo", "none"):
        with pytest.raises(InputError, match=name):
            of_files({"x": tmp_path / name})
    with pytest.raises(InputError):
        of_path(str(tmp_path))


def test_the_hubs_cache_names_files_by_their_hash(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("ab" * 32)).write_bytes(b"gigabytes")
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "blobs" / ("ab" * 32))
    assert of_file(tmp_path / "w.safetensors") == "ab" * 32


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 3)
    memory = tmp_path / "cache/csd3d/fingerprints.json"
    file = tmp_path / "w"
    file.write_bytes(b"1234")
    found = of_file(file)
    remembered = json.loads(memory.read_text())
    assert remembered[str(file)][2] == found
    remembered[str(file)][2] = "known"
    memory.write_text(json.dumps(remembered))
    fingerprint._sha256.cache_clear()
    assert of_file(file) == "known"
    file.write_bytes(b"12345")
    assert of_file(file) not in ("known", found)
    for damaged in ("[", "[1]", '{"a": 1}'):
        memory.write_text(damaged)
        fingerprint._sha256.cache_clear()
        assert of_file(file) == json.loads(memory.read_text())[str(file)][2]


@dataclass(frozen=True)
class Picture:
    where: str
    file: Path
    pose: np.ndarray
    mask: Path | None = None


def test_values_count_and_places_do_not(tmp_path):
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)

    def of(name, pose=(1.0, 2.0), where="here", **more):
        return of_value([Picture(where, tmp_path / name, np.array(pose), **more)], without=["Picture.where"])

    assert of("a") == of("b") == of("a", where="there")
    others = [
        of("c"),
        of("a", (1.0, np.nextafter(2.0, 3.0))),
        of("a", np.float32([1, 2])),
        of("a", mask=tmp_path / "b"),
    ]
    assert len({of("a"), *others}) == 5
    assert of_value(torch.ones(2)) == of_value(np.ones(2, np.float32)) != of_value(torch.ones(2, 1))
    with pytest.raises(TypeError, match="not of a object"):
        of_value({"a": object()}["a"])


def test_of_a_folder_of_frames_only_pictures_count(tmp_path):
    """What file managers and people leave beside the frames does not stop a resume; another picture does."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("0.png", "1.JPG"):
        (folder / name).write_bytes(name.encode())
    before = contents_of(str(folder))
    assert before == {str(folder): of_path(str(folder))}  # as of runs that were started earlier
    for name in ("Thumbs.db", "notes.txt", ".DS_Store", "._0.png", "ehthumbs.db"):
        (folder / name).write_bytes(b"x")
    assert contents_of(str(folder)) == before
    (folder / "0.png").write_bytes(b"other")
    assert contents_of(str(folder)) != before
    assert contents_of("") == contents_of(str(folder / "0.png")) == {}
