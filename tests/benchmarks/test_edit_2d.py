"""The benchmark of panoramas and videos as a user runs it, small: a tiny random prior, a judge of mean colours."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import save_tiny_pipeline

from benchmarks import edit_2d
from csd3d.evaluation.text import Judge
from csd3d.metrics import ClipModel
from csd3d.tasks import edit_canvas


def embed_texts(texts):
    seeds = (torch.Generator().manual_seed(len(text)) for text in texts)
    return F.normalize(torch.stack([torch.randn(3, generator=seed) for seed in seeds]), dim=-1)


@pytest.fixture
def run(tmp_path_factory, tmp_path, monkeypatch, capsys):
    """Runs the command line on tiny inputs; what it printed, and the JSON it wrote."""
    prior = save_tiny_pipeline(tmp_path_factory.mktemp("prior"))
    (prior / "csd3d.json").write_text('{"knows": "world"}')  # else no CLIP judges its pictures of the world
    judge = Judge(ClipModel("CLIP (mean colours)", lambda x: F.normalize(x.mean((2, 3)), dim=-1), embed_texts))
    monkeypatch.setattr(edit_canvas, "load_judge", lambda source, device: judge)
    small = ["world.width=64", "world.height=32", "world.frames=3"]
    small += [f"prior.model={prior}", "sampling.steps=2", "editors.csd_edit.image_scale=1"]
    small += [f"editors.csd_edit.{key}" for key in ("passes=1", "edit.steps=2", "edit.batch=3")]

    def call(*arguments):
        options = ["edit_2d", *small, "--json", str(tmp_path / "b.json"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", [*options, *arguments])
        edit_2d.main()
        return capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())

    return call


def test_all_methods_and_ablations_of_both_inputs(run, tmp_path):
    printed, found = run("--seeds", "0", "--baselines", "ip2p", "ip2p_downscaled")
    shared = {"csd_edit", "ip2p", "ip2p_downscaled", "no_svgd", "random_noise"}
    panorama, video = found["runs"]
    assert set(panorama["results"]) == shared | {"correspondence_overlap"}
    assert set(video["results"]) == shared | {"correspondence_flow"}
    for figures in panorama["results"].values():
        assert {"psnr_truth", "seam_visibility", "clip_directional", "clip_image", "seconds"} <= figures.keys()
    for figures in video["results"].values():
        assert {"psnr_truth", "flow_warped_error", "neighbour_distance", "clip_consistency"} <= figures.keys()
    psnr, rows = ({n: f[key] for n, f in panorama["results"].items()} for key in ("psnr_truth", "unet_evaluations"))
    others = {name: figure for name, figure in psnr.items() if name != "csd_edit"}
    assert psnr["csd_edit"] not in others.values()
    assert 3 * rows["random_noise"] == 2 * rows["csd_edit"] == 2 * rows["no_svgd"]
    assert "svgd: null" in (Path(panorama["folders"]["no_svgd"]) / "config.yaml").read_text()
    assert "| random_noise |" in printed
    assert "| CLIP (mean colours) directional |" in printed
    assert Image.open(tmp_path / "b-panorama.png").size == (190 + 64, 32 * 7)
    assert Image.open(tmp_path / "b-video.png").size == (190 + 3 * 32, 32 * 6)


def test_a_sweep_is_a_curve_a_method_and_finished_runs_are_not_run_again(run, tmp_path, monkeypatch):
    options = ("--seeds", "0", "--inputs", "panorama", "--baselines", "ip2p", "--variants", "--sweep")
    _, found = run(*options)
    curves = found["sweep"]["panorama"]
    assert set(curves) == {"CSD-Edit, edited together", "InstructPix2Pix, one by one"}
    assert all([point[2] for point in points] == ["3", "5", "7.5", "10"] for points in curves.values())
    assert (tmp_path / "b-panorama-sweep.html").read_text().count("<polyline") == 2
    monkeypatch.setattr("csd3d.run.start", None)
    assert run(*options)[1]["runs"] == found["runs"]
