"""A finished run of every task, exported again: nothing that it held is lost, from whatever folder that is asked."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest

CANVAS = """
editors: {csd_edit: {passes: 2, edit: {steps: 3, batch: 4}}}
sampling: {steps: 2}
save_seconds: 0
"""
CASES = {
    "edit_image": "prompt: a red it\nimage: photo.png\ncompare: [ip2p]\n" + CANVAS,
    "edit_panorama": "prompt: a red it\nimage: photo.png\nwrap: true\ncompare: [ip2p, ip2p_downscaled]\n" + CANVAS,
    "edit_video": "prompt: a red it\nvideo: frames\ncompare: [ip2p, pix2video]\n" + CANVAS,
    "text_to_image": """
prompts: [a red chair, a blue ball]
method: [csd, vsd]
particles: 2
size: 32
distill: {steps: 3}
save_seconds: 0
""",
    "text_to_3d": """
prompt: a red chair
compare: [sds]
views_per_step: 2
guidance_size: 32
asset:
  representation:
    field: {levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16, blob_scale: 60}
    render: {steps: 48, resolution: 16, warmup: 8, update_every: 4}
  resolution: [[0, 8]]
  levels: [[0, 4]]
distill: {steps: 3}
evaluate: {views: 4, size: 32}
export: {video_frames: 3, mesh: {resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}
save_seconds: 0
""",
    "edit_scene": "",  # the tiny config that all tests of the task use
}


@pytest.fixture(scope="module")
def priors(tiny_prior, tmp_path_factory):
    return {"edit": tiny_prior, "text": save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")}


@pytest.fixture
def started(request, priors, tiny_config, tmp_path, monkeypatch):
    """The folder of a finished run whose input and prior were named relative to the folder it was started in."""
    task, home = request.param, tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(priors["text" if task.startswith("text") else "edit"], "prior")
    for path in ("photo.png", "frames/0.png", "frames/1.png"):
        (home / path).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(len(path)).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    config = home / "config.yaml"
    config.write_text(f"task: {task}\nprior: {{model: prior}}\n{CASES[task]}")
    if task == "edit_scene":
        config.write_text(tiny_config.read_text())
    folder = jobs.start(config, [], home / "run", None, "cpu", stop=StopRequest())
    return folder


def metrics_of(folder):
    """metrics.json without what a clock or the system measured at the end."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("encode", "export", "evaluate", "total"):
        metrics["seconds"].pop(key, None)
    metrics.pop("peak_memory_gib")
    if metrics.get("mesh"):
        metrics["mesh"].pop("seconds")
    return metrics


def files_of(folder):
    """Every result but the report and the binary curves, by name."""
    kept = (p for p in folder.rglob("*") if p.suffix in (".png", ".mp4", ".obj", ".ply", ".glb", ".jsonl", ".json"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.name != "metrics.json"}


@pytest.mark.parametrize("started", CASES, indirect=True)
def test_an_exported_run_keeps_all_that_it_held(started, tmp_path, monkeypatch):
    before = metrics_of(started), files_of(started)
    assert before[0]["finished"]
    assert len(before[0]["results"]) >= 2
    for elsewhere in (started.parent, tmp_path):
        monkeypatch.chdir(elsewhere)
        stop = StopRequest()
        jobs.export(started, [], "cpu", stop=stop)
        assert metrics_of(started) == before[0]
        assert files_of(started) == before[1]
        assert not stop.requested


@pytest.mark.parametrize("started", ["edit_video", "text_to_3d", "edit_scene"], indirect=True)
def test_what_has_no_checkpoint_is_left_out_and_not_computed(started):
    """A run killed before its comparison: it is exported as it stands, and says that it is not finished."""
    main, *others = metrics_of(started)["results"]
    for name in others:
        shutil.rmtree(started / "checkpoints" / name)
    jobs.export(started, [], "cpu", stop=StopRequest())
    assert list(metrics_of(started)["results"]) == [main]
    assert not metrics_of(started)["finished"]
    assert [p.name for p in (started / "checkpoints").iterdir() if p.name != "reconstruct"] == [main]
    jobs.resume(started, [], "cpu", stop=StopRequest())
    assert list(metrics_of(started)["results"]) == [main, *others]
    assert metrics_of(started)["finished"]


@pytest.mark.parametrize("started", ["edit_image"], indirect=True)
def test_a_run_without_a_checkpoint_is_not_exported(started):
    shutil.rmtree(started / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet"):
        jobs.export(started, [], "cpu", stop=StopRequest())


@pytest.mark.parametrize("started", ["edit_image"], indirect=True)
def test_a_run_on_the_shipped_prior_may_be_exported_elsewhere(started, monkeypatch, tmp_path):
    """Named as it is in the package from the package's own folder, and found there from any other."""
    config = started.parent / "config.yaml"
    monkeypatch.chdir(jobs.PACKAGE_ROOT)
    keys = ["prior.model=csd3d/assets/ip2p", f"image={started.parent}/photo.png", "compare=[]"]
    keys.append("editors.csd_edit.edit.steps=1")
    folder = jobs.start(config, keys, tmp_path / "shipped", None, "cpu", stop=StopRequest())
    assert "model: csd3d/assets/ip2p" in (folder / "config.yaml").read_text()
    before = metrics_of(folder)
    monkeypatch.chdir(tmp_path)
    jobs.export(folder, [], "cpu", stop=StopRequest())
    assert metrics_of(folder) == before
