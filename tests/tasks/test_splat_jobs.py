"""Whole jobs on Gaussian splats: edits and text to 3D; stopped runs end as unbroken ones."""

import json
from pathlib import Path

import pytest
import torch
from tiny_jobs import files_of, metrics_of, start, write_job
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.config import load_config
from csd3d.datasets.splat_files import read_splats
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.representations.splat_scene import SplatScene
from csd3d.representations.splats import GaussianSplats
from csd3d.tasks.text_to_3d import TextTo3DConfig
from custom_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels are not compiled")
CONFIG = Path(__file__).parents[2] / "configs" / "csd-text-to-3d.yaml"
SPLATS = ["type: splats", "count: 150", "max_count: 170", "relocate_every: 4"]
REPRESENTATION = "{" + ", ".join(SPLATS) + "}"


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_capture, tiny_prior):
    """Writes the tiny job of a task, with splats in place of the NeRF; returns the config."""
    text = save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")

    def write(task, folder):
        config = write_job(folder, task, {"edit": tiny_prior, "text": text}, tiny_capture)
        lines, skipping = [], False
        for line in config.read_text().splitlines():
            indent = line[: len(line) - len(line.lstrip())]
            if line.strip() == "representation:":
                lines.append(f"{indent}representation: {REPRESENTATION}")
                skipping = True
            elif not (skipping and line.strip().startswith(("field:", "render:"))):
                lines.append(line)
                skipping = False
        config.write_text("\n".join(lines).replace("  levels: [[0, 4]]\n", "") + "\n")
        return config

    return write


def stopped_and_resumed(config, folder, monkeypatch, method, at, overrides=()):
    """A run stopped in the `at`-th call of a method of the scene, then resumed."""
    stop, original, calls = StopRequest(), getattr(SplatScene, method), []

    def counted(self, *args, **kwargs):
        calls.append(1)
        stop.requested |= len(calls) == at
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SplatScene, method, counted)
        start(config, folder, *overrides, stop=stop)
    jobs.resume(folder, [], "cpu", stop=StopRequest())


def test_an_edit_of_splats_and_what_it_writes(job, tmp_path, monkeypatch):
    config = job("edit_scene", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    whole = start(config, tmp_path / "whole", "compare=[]")
    assert json.loads((whole / "metrics.json").read_text())["results"]["csd_edit"]["psnr_truth"] > 5
    splats = read_splats(whole / "mesh" / "splats.ply", "")
    assert 150 < len(splats.means) <= 170
    stopped_and_resumed(config, tmp_path / "broken", monkeypatch, "fit_step", 46, ["compare=[]"])
    assert metrics_of(tmp_path / "broken")["results"].keys() == {"csd_edit"}
    again = read_splats(tmp_path / "broken" / "mesh" / "splats.ply", "")
    assert all(torch.equal(a, b) for a, b in zip(again, splats, strict=True))

    # what was written is a scene that can be edited: its cameras are the capture's
    (whole / "mesh" / "splats.ply").rename(tmp_path / "home" / "scene" / "scene.ply")
    other = start(config, tmp_path / "other", "compare=[]", "scene.path=scene/scene.ply", "reconstruct.steps=2")
    assert (other / "report.html").exists()
    assert len(read_splats(other / "mesh" / "splats.ply", "").means) == len(splats.means)


def test_a_type_on_the_command_line_takes_the_place_of_a_config_s(tmp_path):
    """configs/csd-text-to-3d.yaml has keys of the NeRF, which splats do not have."""
    config = load_config(CONFIG, ["asset.representation.count=9", "asset.representation.type=splats"], TextTo3DConfig)
    assert config.asset.representation.thing == GaussianSplats(count=9)
    with pytest.raises(InputError, match="wrong"):
        load_config(CONFIG, ["asset.representation.type=splats", "asset.representation.wrong=9"], TextTo3DConfig)
    with pytest.raises(InputError, match="field"):
        load_config(CONFIG, ["asset.representation.type=splats", "asset.representation.field={}"], TextTo3DConfig)


def test_text_to_3d_of_splats(job, tmp_path, monkeypatch):
    config = job("text_to_3d", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    overrides = ["compare=[]", "distill.steps=8"]
    whole = start(config, tmp_path / "whole", *overrides)
    assert (whole / "mesh" / "splats.ply").stat().st_size > 1000
    stopped_and_resumed(config, tmp_path / "broken", monkeypatch, "render", 6, overrides)
    files = {name: data for name, data in files_of(whole).items() if name.endswith(("splats.ply", "views.png"))}
    assert len(files) == 2
    assert files.items() <= files_of(tmp_path / "broken").items()
