"""The example plugin, each thing of it by its file: named in a config, with its own keys, its title in the report."""

import json
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
from csd3d.datasets.listing import read_listing
from csd3d.distillation.method import Query
from csd3d.distillation.methods.sds import SDS
from csd3d.distillation.step import DistillConfig, distill_step
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.representations.fit import FitConfig, Pictures
from csd3d.schema import choose

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"
EXAMPLE = PLUGIN / "csd3d_example"
THINGS = {
    "towards_grey": ("method", "towards_grey"),
    "fade_canvas": ("canvas_editor", "fade"),
    "fade_scene": ("scene_editor", "fade"),
    "ball": ("representation", "ball"),
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


def test_the_representation_finds_a_ball_from_its_pictures():
    ball = load("ball")(softness=0.02)
    box, generator = torch.tensor([-1.0, -1, -1, 1, 1, 1]), torch.Generator().manual_seed(0)
    true, found = (ball.open(box, generator, background="white") for _ in range(2))
    with torch.no_grad():
        true.centre += torch.tensor([0.2, -0.1, 0.15])
        true.colour += torch.tensor([3.0, -3.0, 0.0])
    cameras, views = orbit(6, 3.0, 30.0, 45.0, 24, 16), torch.arange(6)
    pictures = Pictures(true.render_views(cameras, views).rgb, cameras, None, views)
    config = FitConfig(steps=300, learning_rate=0.05, final_learning_rate=0.005, opacity_weight=0.0)
    optimiser = found.start_fit(config)
    for step in range(300):
        assert found.fit_step(optimiser, pictures, config, step, generator)["skipped"] == 0
    assert torch.allclose(found.centre, true.centre, atol=0.02)
    assert torch.allclose(found.log_radius, true.log_radius, atol=0.1)
    depth = found.render_views(cameras, views[:1]).depth[0, 8, 12]
    assert 2.2 < depth < 2.8  # cameras stand 3 from the middle


# ----------------------------------------------------------------------------------------------------------- in a job


def run(tmp_path, text: str, *overrides: str) -> Path:
    """Does the job that a config says; its run folder."""
    (tmp_path / "job.yaml").write_text(text)
    folder = tmp_path / "run"
    assert launch.main(["--config", str(tmp_path / "job.yaml"), "--output", str(folder), *overrides]) == 0
    return folder


def test_a_job_names_the_method_and_the_family(tmp_path):
    text = f"""
task: text_to_image
plugins: [{EXAMPLE / "towards_grey.py"}, {EXAMPLE / "one_colour.py"}]
prompt: a red picture
particles: 2
size: 16
space: latent
prior: {{model: {EXAMPLE / "one_colour_model"}, dtype: float32}}
method: [{{type: towards_grey, pull: 0.0}}, sds, towards_grey+csd]
distill: {{steps: 40, guidance_scale: 1.0}}
learning_rate: 0.1
"""
    folder = run(tmp_path, text, "--device", "cpu")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["results"].keys() == {"towards_grey", "sds", "towards_grey+csd"}
    report = (folder / "report.html").read_text()
    assert "SDS, towards grey" in report
    assert "SDS, towards grey + CSD" in report
    used = "Model: Pictures of one colour (one_colour_model)"
    assert f'<p class="scene">{used}</p>' in report
    assert used in (folder / "log.txt").read_text()


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
    report = (folder / "report.html").read_text()
    assert "Fade to grey" in report
    assert f"<br>Model: Stable Diffusion 1.x and 2.x, InstructPix2Pix ({tiny_prior.name})<br>Warning: " in report
    assert "amount: 0.75" in (folder / "config.yaml").read_text()
    assert launch.main(["--resume", str(folder)]) == 0  # from its own config, which names the plugin


def test_a_scene_is_a_ball_and_fades(tmp_path, tiny_capture, tiny_prior):
    text = f"""
task: edit_scene
plugins: [{EXAMPLE / "ball.py"}, {EXAMPLE / "fade_scene.py"}]
prompt: paint it a bright colour
scene: {{path: {tiny_capture}}}
prior: {{model: {tiny_prior}}}
representation: {{type: ball, softness: 0.1}}
reconstruct: {{steps: 30}}
fit: {{steps: 6, patches: 0, distortion_weight: 0.1}}
editor: {{type: fade, every: 2}}
export: {{video_frames: 2, mesh: {{resolution: 16, texture_size: 32, face_budget: 200, threshold: 0.5}}}}
"""
    folder = run(tmp_path, text)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["results"]["fade"]["psnr_truth"] > 5
    report = (folder / "report.html").read_text()
    assert "Fade to grey" in report
    assert " · Scene: A ball · Capture: nerfstudio and instant-ngp<br>Warning: " in report
    assert "fit.distortion_weight is set, but has no effect: A ball has" in (folder / "log.txt").read_text()
    assert (folder / "mesh" / "mesh.glb").exists()


def test_an_asset_is_a_ball_and_turns_red(tmp_path):
    text = f"""
task: text_to_3d
plugins: [{EXAMPLE / "ball.py"}, {EXAMPLE / "one_colour.py"}]
prompt: a red ball
method: sds
guidance_size: 16
prior: {{model: {EXAMPLE / "one_colour_model"}, dtype: float32}}
asset: {{representation: {{type: ball}}, background: white, resolution: [[0, 16]], levels: [[0, 3], [99, 5]]}}
losses: {{orientation: 0.1, distortion: 0.1}}
distill: {{steps: 40, guidance_scale: 1.0}}
optim: {{learning_rate: 0.2, ema: 0.5}}
evaluate: {{views: 2, size: 32}}
export: {{video_frames: 2, mesh: {{resolution: 16, texture_size: 32, face_budget: 200, threshold: 0.5}}}}
"""
    folder = run(tmp_path, text, "--device", "cpu")
    assert json.loads((folder / "metrics.json").read_text())["finished"]
    assert (folder / "mesh" / "mesh.glb").exists()
    assert "Model: Pictures of one colour (one_colour_model) · Scene: A ball" in (folder / "report.html").read_text()
    told = (folder / "log.txt").read_text()
    for key in ("losses.orientation", "losses.distortion", "asset.levels"):
        assert told.count(f"{key} is set, but has no effect: A ball has no") == 1
    red, green, blue = np.asarray(Image.open(folder / "images" / "sds" / "0" / "000.png"))[16, 16] / 255
    assert red > 0.8
    assert max(green, blue) < 0.3
    assert launch.main(["--resume", str(folder)]) == 0  # from its own config, with the representation's keys


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


def test_what_a_reader_does_not_catch_is_a_line(tmp_path):
    class Careless:
        def read(self, path):
            return (path / "nowhere").read_text()

    with pytest.raises(InputError, match=r"scene.path: .*Careless cannot read it \(FileNotFoundError"):
        read_listing(tmp_path, Careless())
