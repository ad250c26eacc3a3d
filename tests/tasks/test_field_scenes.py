"""Whole jobs on awkward captures: they end with all their results, and what is wrong is told before any work."""

import json

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from csd3d import run as jobs
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest

QUICK = ["reconstruct.steps=8", "fit.steps=6", "compare=[]", "export.mesh.threshold=0.01", "scene.holdout_every=3"]


def respoiled(capture, folder, change):
    """A copy of the capture whose frames `change(i, frame, picture)` has changed; it returns the new picture."""
    meta = json.loads((capture / "transforms.json").read_text())
    (folder / "images").mkdir(parents=True)
    kept = []
    for i, frame in enumerate(meta["frames"]):
        frame.pop("split")
        picture = change(i, frame, Image.open(capture / frame["file_path"]).convert("RGB"))
        if picture is not None:
            picture.save(folder / frame["file_path"])
            kept.append(frame)
    meta["frames"] = kept
    (folder / "transforms.json").write_text(
        json.dumps({k: v for k, v in meta.items() if k not in ("w", "h", "cx", "cy")})
    )
    return folder


def one_photo(i, frame, picture):
    return picture if i == 0 else None


def two_sizes(i, frame, picture):
    width, height = (32, 24) if i % 2 else (24, 32)
    left, top = (32 - width) // 2, (32 - height) // 2
    return picture.crop((left, top, left + width, top + height))


def tripod(i, frame, picture):
    for row in frame["transform_matrix"][:3]:
        row[3] = 1.0
    return picture


@pytest.mark.parametrize("change", [one_photo, two_sizes, tripod])
def test_jobs_end_with_all_results(tiny_capture, tiny_config, tmp_path, change):
    folder = respoiled(tiny_capture, tmp_path / "capture", change)
    run = jobs.start(tiny_config, [f"scene.path={folder}", *QUICK], tmp_path / "run", None, "cpu", stop=StopRequest())
    assert json.loads((run / "metrics.json").read_text())["finished"] is True
    assert (run / "report.html").stat().st_size > 0
    poses = [frame["transform_matrix"] for frame in json.loads((run / "videos/camera_path.json").read_text())["frames"]]
    assert np.isfinite(poses).all()
    assert "nan" not in (run / "metrics.json").read_text().lower()
    if change is two_sizes:
        sizes = {Image.open(path).size for path in (run / "images/csd_edit/train").glob("*.png")}
        assert sizes == {(32, 24), (24, 32)}


def test_the_mesh_of_a_run_is_where_scene_json_says(tiny_capture, tiny_config, tmp_path):
    """The scene's box of a capture far away; the GLB mapped by scene.json agrees with the OBJ."""
    offset = [5e5, 4.1e6, 120.0]

    def far(i, frame, picture):
        for row, x in zip(frame["transform_matrix"], offset, strict=False):
            row[3] += x
        return picture

    folder = respoiled(tiny_capture, tmp_path / "capture", far)
    meta = json.loads((folder / "transforms.json").read_text())
    meta["aabb"] = (np.array(meta["aabb"]) + offset).tolist()
    (folder / "transforms.json").write_text(json.dumps(meta))
    run = jobs.start(tiny_config, [f"scene.path={folder}", *QUICK], tmp_path / "run", None, "cpu", stop=StopRequest())
    said = json.loads((run / "scene.json").read_text())
    obj, glb = (trimesh.load_mesh(run / "mesh" / f"mesh.{suffix}", process=False) for suffix in ("obj", "glb"))
    back = np.array(said["glb_to_own"])
    mapped = glb.vertices @ back[:3, :3].T + back[:3, 3]
    np.testing.assert_allclose(mapped.max(0), obj.vertices.max(0), atol=1e-4)
    np.testing.assert_allclose(mapped.min(0), obj.vertices.min(0), atol=1e-4)
    low, high = np.array(meta["aabb"])
    assert (obj.vertices > low - 0.2).all()
    assert (obj.vertices < high + 0.2).all()
    for file in (run / "videos").glob("*.json"):
        path = torch.tensor([frame["transform_matrix"] for frame in json.loads(file.read_text())["frames"]]).double()
        assert ((path[:, :3, 3] - torch.tensor(offset)).norm(dim=1) - 4).abs().max() < 1  # its cameras stand 4 away


def test_a_broken_world_json_is_told_before_any_work(tiny_capture, tiny_config, tmp_path):
    folder = respoiled(tiny_capture, tmp_path / "capture", lambda i, frame, picture: picture)
    (folder / "world.json").write_text(json.dumps({"kind": "cube", "colour": "yellow", "scale": 0}))
    with pytest.raises(InputError, match=r"world.json"):
        jobs.start(tiny_config, [f"scene.path={folder}"], tmp_path / "run", None, "cpu", stop=StopRequest())
    assert not (tmp_path / "run" / "checkpoints").exists()
