"""The example plugin, each thing of it by its file: named in a config, with its own keys, its title in the report."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import launch
from csd3d import registry
from csd3d.cameras import orbit
from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.method import Query
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.priors import PriorConfig, load_prior
from csd3d.schema import choose

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"
EXAMPLE = PLUGIN / "csd3d_example"
THINGS = {
    "towards_grey": ("method", "towards_grey"),
    "fade_canvas": ("canvas_editor", "fade"),
    "one_colour": ("family", "one_colour"),
    "poses": ("reader", "poses"),
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What tests load is gone after each."""
    for kind in registry.PACKAGES:
        registry.names(kind)
    monkeypatch.setattr(registry, "_entries", {kind: dict(found) for kind, found in registry._entries.items()})
    yield
    for name in [name for name in sys.modules if name.startswith("csd3d_plugin_")]:
        del sys.modules[name]


def load(file: str):
    """The thing that a file of the example brings."""
    kind, name = THINGS[file]
    registry.load_plugins([str(EXAMPLE / f"{file}.py")])
    return registry.get(kind, name).thing


@pytest.mark.parametrize("file", THINGS)
def test_every_file_works_alone(file):
    assert load(file).__doc__


# ---------------------------------------------------------------------------------------- each does what it says


def step_of(method, prior, z, prompts, seed=0):
    config = DistillConfig(steps=1, guidance_scale=1.0, weight="one")
    generator = torch.Generator().manual_seed(seed)
    return distill_step(prior.predict, method, z, 0, config, prior.alphas_cumprod, generator, prompts=prompts)[0]


def one_colour_prior():
    load("one_colour")
    return load_prior(PriorConfig(str(EXAMPLE / "one_colour_model"), device="cpu"), "text")


def test_the_method_is_sds_and_a_pull_to_zero():
    prior, z = one_colour_prior(), torch.rand(2, 3, 16, 16)
    sds = step_of(SDS(), prior, z, ("red", "blue"))
    method = load("towards_grey")
    assert torch.equal(step_of(method(pull=0.0), prior, z, ("red", "blue")), sds)
    assert torch.allclose(step_of(method(pull=0.5), prior, z, ("red", "blue")), sds + 0.5 * z, atol=1e-6)


def test_the_family_is_the_exact_score_of_its_colours():
    prior = one_colour_prior()
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    alpha_bar = prior.alphas_cumprod[500]
    eps = prior.predict({"x": Query(alpha_bar.sqrt() * red, 500, ("a red picture",))})["x"]
    assert eps.abs().max() < 1e-6  # the score is 0 at the mean
    z = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for number in range(60):
        z = z - 0.5 * step_of(SDS(), prior, z, ("a red picture",), seed=number)
    assert (prior.decode(z) - torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).abs().mean() < 0.05


def test_the_reader_reads_its_own_poses(tmp_path):
    load("poses")
    cameras = orbit(5, 4.0, 30.0, 45.0, 12, 8)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 12, 3), 10 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    poses = cameras.camera_to_world.reshape(5, 12).numpy()
    np.savetxt(tmp_path / "poses.txt", np.column_stack((cameras.fx.numpy(), poses)))
    frame = {"orientation": "none", "centre": "none", "auto_scale": False}
    capture = load_capture(SceneConfig(str(tmp_path), choose("reader", "poses", images="photos"), **frame))
    assert torch.allclose(capture.cameras.camera_to_world, cameras.camera_to_world, atol=1e-5)
    assert torch.allclose(capture.cameras.fx, cameras.fx)
    assert capture.images[:, 0, 0, 0].tolist() == pytest.approx([10 * i / 255 for i in range(5)])
    (tmp_path / "poses.txt").write_text("1 2 3")
    with pytest.raises(registry.InputError, match=r"poses.txt.*expected 13"):
        load_capture(SceneConfig(str(tmp_path), choose("reader", "poses", images="photos")))


# ----------------------------------------------------------------------------------------------------------- in a job


def run(tmp_path, text: str, *overrides: str) -> Path:
    """Does the job that a config says; its run folder."""
    (tmp_path / "job.yaml").write_text(text)
    folder = tmp_path / "run"
    assert launch.main(["--config", str(tmp_path / "job.yaml"), "--output", str(folder), *overrides]) == 0
    return folder


def test_a_job_names_the_editor_with_its_own_keys(tmp_path, tiny_prior):
    text = f"""
task: edit_image
plugins: [{EXAMPLE / "fade_canvas.py"}]
prompt: paint it a bright colour
world: {{width: 64, height: 64}}
prior: {{model: {tiny_prior}}}
editor: {{type: fade, amount: 0.75, steps: 3}}
"""
    folder = run(tmp_path, text)
    assert "Fade to grey" in (folder / "report.html").read_text()
    assert "amount: 0.75" in (folder / "config.yaml").read_text()
    assert launch.main(["--resume", str(folder)]) == 0  # from its own config, which names the plugin


# ------------------------------------------------------------------------------------------------------- when installed


@pytest.fixture
def installed(tmp_path):
    """A folder as pip makes it of the package: its code, and its metadata with the entry points of its pyproject."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    (tmp_path / "csd3d_example").symlink_to(EXAMPLE)
    info = tmp_path / f"csd3d_example-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in d.items()) for group, d in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


def test_an_installed_plugin_needs_no_key(installed):
    command = [sys.executable, str(ROOT / "launch.py"), "methods"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(installed)}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "SDS, towards grey" in done.stdout
    assert "csd3d_example/towards_grey.py:" in done.stdout
    assert "Δ = ε^ω(z_t; y) − ε + λ z" in done.stdout
