"""configs/real/ on tiny random models of the same kinds, shortened: each is read by its task and runs to its end."""

import json

import pytest
from tiny_models import save_tiny_flux, save_tiny_if, save_tiny_pipeline

from csd3d import run as jobs
from csd3d.config_files import CONFIGS
from csd3d.interrupt import StopRequest
from csd3d.run import read

REAL = CONFIGS / "real"
MESH = [
    "export.mesh.resolution=16",
    "export.mesh.texture_size=64",
    "export.mesh.face_budget=200",
    "export.video_frames=1",
]
FIELD = "{levels: 3, log2_hashmap_size: 8, max_resolution: 32, hidden: 16"
SCENE = [
    f"representation.field={FIELD}}}",
    "representation.render={steps: 32, resolution: 16, warmup: 2, update_every: 2}",
    *(f"{part}.{key}" for part in ("reconstruct", "fit") for key in ("steps=2", "rays=64", "samples=512")),
    "fit.patches=1",
    "fit.patch_size=16",
    "editors.csd_edit={rounds: 2, edit_every: 1, later_steps: 1, edit: {steps: 2}}",
    "export.mesh.threshold=0.1",
    *MESH,
]
CANVAS = [
    "editors.csd_edit.edit.steps=2",
    "editors.csd_edit.edit.batch=2",
    "editors.csd_edit.passes=1",
    "sampling.steps=1",
]
DEMO = ["prompt=paint it blue", "world.width=48", "world.height=32", "world.frames=2"]
ASSET = [
    "prompt=a red it",
    f"asset.representation.field={FIELD}, blob_scale: 60}}",
    "asset.representation.render={steps: 16, resolution: 16, warmup: 2, update_every: 2}",
    "asset.resolution=[[0,8]]",
    "asset.levels=[[0,3]]",
    "distill.steps=2",
    "losses.opacity=0",
    "evaluate={views: 1, size: 16}",
    *MESH,
]
JOBS = {  # the model that stands in for each, and what makes it short
    "edit-scene-ip2p": ("edit", SCENE),
    "edit-scene-kontext": ("kontext", [*SCENE, "working_size=64"]),
    "edit-video-ip2p": ("edit", [*DEMO, *CANVAS]),
    "edit-panorama-ip2p": ("edit", [*DEMO, *CANVAS]),
    "edit-image-ip2p": ("edit", [*DEMO, *CANVAS]),
    "text-to-3d-sd21": ("text", ASSET),
    "text-to-3d-deepfloyd": ("if", ASSET),
}


@pytest.fixture(scope="module")
def models(tiny_prior, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    text, pixels = save_tiny_pipeline(folder / "text", "text"), save_tiny_if(folder / "if")
    return {"edit": tiny_prior, "kontext": save_tiny_flux(folder / "kontext"), "text": text, "if": pixels}


@pytest.mark.parametrize("name", JOBS)
def test_a_real_config_runs_shortened(name, models, tiny_capture, tmp_path):
    kind, short = JOBS[name]
    capture = [f"scene.path={tiny_capture}"] if "scene" in name else []
    keys = [*short, *capture, f"prior.model={models[kind]}"]
    folder = jobs.start(REAL / f"{name}.yaml", keys, tmp_path / "run", None, "cpu", stop=StopRequest())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    main = next(iter(metrics["results"].values()))
    assert 0 < main.get("kernel_mean", 1.0) <= 1  # a picture in one piece has none to share with
    assert not [
        key for key in main if "clip" in key or key in ("fd", "rank")
    ]  # the toy world judges no other's pictures


def test_every_real_config_is_run():
    assert {file.stem for file in REAL.glob("*.yaml")} == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_first_lines_say_how_to_run_it_and_on_what(name):
    first, command, card, *_ = (REAL / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert f"--config configs/real/{name}.yaml" in command
    assert "GiB" in card
    assert "estimate" in card


@pytest.mark.parametrize("name", JOBS)
def test_numbers_that_depend_on_the_model_are_left_to_it(name):
    config = read(REAL / f"{name}.yaml", [])
    if config.task == "text_to_3d":
        assert (config.guidance_size, config.distill.t_max, config.distill.svgd.bandwidth) == (None, None, "model")
        return
    editor = config.editor.thing
    assert (editor.text_scale, editor.image_scale, editor.edit.t_max) == (None, None, None)
    assert editor.edit.svgd.bandwidth == "model"
    assert getattr(config, "working_size", None) is None
