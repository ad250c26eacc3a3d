"""Text to image and to 3D as a user runs them, on a tiny random prior: what is left behind, and resuming."""

import json

import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.tasks.text_guide import Guide


@pytest.fixture(scope="module")
def tiny_text_prior(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("text-prior"), "text")


@pytest.fixture
def image_config(tiny_text_prior, tmp_path):
    path = tmp_path / "image.yaml"
    path.write_text(f"""
task: text_to_image
prompts: [a red chair, a blue ball]
method: [csd, sdi, vsd]
particles: 2
size: 32
prior: {{model: {tiny_text_prior}}}
distill: {{steps: 4, inversion_steps: 2}}
save_seconds: 0
""")
    return path


@pytest.fixture
def asset_config(tiny_text_prior, tmp_path):
    path = tmp_path / "asset.yaml"
    path.write_text(f"""
task: text_to_3d
prompt: a red chair
method: vsd+csd
compare: [fsd]
particles: 2
views_per_step: 2
guidance_size: 32
prior: {{model: {tiny_text_prior}}}
asset:
  field: {{levels: 4, log2_hashmap_size: 10, max_resolution: 32, hidden: 16, blob_scale: 60}}
  render: {{steps: 48, resolution: 16, warmup: 8, update_every: 4}}
  resolution: [[0, 8], [2, 12]]
  levels: [[0, 2], [2, 4]]
shading: {{start: 0, lambertian: 0.5}}
losses: {{orientation: 0.1, sparsity: 0.1}}
optim: {{ema: 0.5, clip: 1.0}}
distill: {{steps: 4}}
evaluate: {{views: 4, size: 32}}
export: {{video_frames: 3, mesh: {{resolution: 16, texture_size: 64, face_budget: 400, threshold: 0.5}}}}
save_seconds: 0
""")
    return path


def start(config, folder, *overrides):
    return jobs.start(config, list(overrides), folder, None, "cpu", stop=StopRequest())


def pictures(folder):
    found = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("images/**/*.png"))}
    return {name: data for name, data in found.items() if "preview" not in name.name}


def broken_and_resumed(config, folder, monkeypatch, at):
    """A run stopped in the middle of its `at`-th step of guidance, then resumed."""
    stop, step, calls = StopRequest(), Guide.step, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            stop.requested = True
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Guide, "step", counted)
        jobs.start(config, [], folder, None, "cpu", stop=stop)
    assert len(calls) == at
    jobs.resume(folder, [], "cpu", stop=StopRequest())


@pytest.mark.parametrize("kind", ["image_config", "asset_config"])
def test_a_stopped_run_resumes_to_the_same_pictures(kind, request, tmp_path, monkeypatch):
    """VSD's network, SDI's noise, FSD's map, averages and milestones included."""
    config = request.getfixturevalue(kind)
    whole = start(config, tmp_path / "whole")
    for at in (2, 7):
        broken_and_resumed(config, tmp_path / f"broken-{at}", monkeypatch, at)
        assert pictures(tmp_path / f"broken-{at}") == pictures(whole)
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (whole, tmp_path / "broken-7")]
    counts = [{name: r["unet_evaluations"] for name, r in m["results"].items()} for m in metrics]
    assert counts[0] == counts[1]
    assert metrics[1]["finished"]


def test_text_to_image_draws_every_method_from_the_same_start(image_config, tmp_path):
    folder = start(image_config, tmp_path / "run")
    grid = Image.open(folder / "images" / "grid.png")
    assert grid.height == 3 * 32
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["prompts"] == ["a red chair", "a blue ball"]
    evaluations = {name: r["unet_evaluations"] for name, r in metrics["results"].items()}
    # 2 prompts × 4 steps × 2 particles: null and text; SDI inverts in at most 2 steps of two; VSD asks and trains ε_φ
    assert evaluations["csd"] == 32
    assert evaluations["vsd"] == 16 * (2 + 1 + 1)
    assert 32 < evaluations["sdi"] <= 32 + 64


def test_pixels_are_distilled_through_the_encoder(image_config, tmp_path):
    folder = start(image_config, tmp_path / "run", "method=[sds]", "space=pixel")
    assert len(list((folder / "images" / "sds").iterdir())) == 4
    with pytest.raises(InputError, match="space is pixel"):
        start(image_config, tmp_path / "other", "space=pixel")


def test_text_to_3d_leaves_meshes_videos_and_a_report(asset_config, tmp_path):
    folder = start(asset_config, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["results"]) == {"vsd+csd", "fsd"}
    assert {p.name for p in (folder / "videos").iterdir()} == {"vsd-csd.mp4", "fsd.mp4"}
    assert (folder / "mesh" / "mesh.glb").stat().st_size > 1000
    assert (folder / "mesh-1" / "mesh.obj").exists()
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list((folder / "images" / "fsd" / "1").iterdir())) == 4
    steps = [json.loads(line) for line in (folder / "curves" / "vsd+csd" / "curves.jsonl").read_text().splitlines()]
    assert {"t", "lora_loss", "kernel_mean", "orientation", "opacity"} <= steps[0].keys()


def test_what_a_method_lacks_is_said_before_a_folder_is_made(image_config, tmp_path):
    with pytest.raises(InputError, match=r"train lmc"):
        start(image_config, tmp_path / "run", "method=[lmc]", f"guide.expected={tmp_path}/nowhere")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="edits a source"):
        start(image_config, tmp_path / "run", "method=[csd_edit]")
    with pytest.raises(InputError, match="prompts is empty"):
        start(image_config, tmp_path / "run", "prompts=[]")


def test_one_prompt_on_the_command_line_wins(image_config, tmp_path):
    folder = start(image_config, tmp_path / "run", "prompt=a green duck", "method=[sds]")
    assert json.loads((folder / "metrics.json").read_text())["prompts"] == ["a green duck"]
    assert torch.tensor(Image.open(folder / "images" / "grid.png").size).tolist()[1] == 32
