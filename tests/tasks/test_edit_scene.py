"""The whole job on a tiny scene: what it writes, that a killed run ends as an unbroken one, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csd3d import run as jobs
from csd3d.engine.phase import Job
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from launch import main

ROOT = Path(__file__).parents[2]
FIGURES = {"psnr_truth", "ssim_truth", "psnr_outside", "warped_error", "unet_evaluations", "seconds"}


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    return jobs.start(tiny_config, [], tmp_path_factory.mktemp("runs") / "whole", None, "cpu", stop=StopRequest())


def read_results(folder):
    """metrics.json without what a clock measured."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for figures in metrics["results"].values():
        figures.pop("seconds")
    return metrics["results"], metrics["reconstruction"]


def test_run_writes_what_it_promises(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["task"] == "edit_scene"
    assert {"total", "reconstruct", "edit", "evaluate", "export"} <= metrics["seconds"].keys()
    assert metrics["peak_memory_gib"] > 0.1
    assert metrics["reconstruction"].keys() == {"psnr", "ssim"}
    assert metrics["results"].keys() == {"csd_edit", "in2n"}
    for figures in metrics["results"].values():
        assert figures.keys() >= FIGURES
        assert figures["psnr_truth"] > 0
    for name in ("config.yaml", "cmd.txt", "log.txt", "environment.json", "report.html", "images/views.png"):
        assert (finished / name).stat().st_size > 0
    log = (finished / "log.txt").read_text()
    phases = ["reconstruct", "csd_edit", "in2n", "evaluate", "video", "mesh", "report"]
    assert f"7 phases: {', '.join(phases)}" in log
    assert [f"phase {i + 1} of 7: {name}\n" in log for i, name in enumerate(phases)] == [True] * 7
    assert f"run folder {finished}" in log
    assert "in2n: 12/12, " in log
    for name in (
        "videos/csd_edit.mp4",
        "videos/in2n.mp4",
        "videos/before.mp4",
        "videos/after-in2n.mp4",
        "mesh/mesh.glb",
        "mesh/mesh.obj",
        "mesh/mesh.ply",
    ):
        assert (finished / name).stat().st_size > 100, name


def test_unet_evaluations_are_what_the_config_asks_for(finished):
    results, _ = read_results(finished)
    # 5 views, rounds of 2 steps and of 1, 3 rows a view at image scale 1; IN2N: 3 edits of ≤ 2 steps, 3 rows
    assert results["csd_edit"]["unet_evaluations"] == 5 * (2 + 1) * 3
    assert 3 * 3 <= results["in2n"]["unet_evaluations"] <= 3 * 2 * 3


def test_resuming_a_finished_run_changes_nothing(finished):
    before = read_results(finished)
    jobs.resume(finished, [], "cpu", stop=StopRequest())
    assert read_results(finished) == before


@pytest.mark.parametrize("phase", ["reconstruct", "csd_edit", "in2n"])
def test_killed_run_resumes_to_the_same_results(finished, tiny_config, tmp_path, phase):
    """SIGKILL as soon as a phase has its first checkpoint; the resumed run must end exactly as the unbroken one."""
    folder = tmp_path / "killed"
    command = [sys.executable, "launch.py", "--config", str(tiny_config), "--output", str(folder), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / phase / "checkpoint.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (folder / "metrics.json").exists()
    jobs.resume(folder, [], "cpu", stop=StopRequest())
    assert read_results(folder) == read_results(finished)


def test_a_stop_request_finishes_with_what_there_is_and_resume_completes_it(finished, tiny_config, tmp_path):
    stop = StopRequest()
    stop.requested = True
    folder = jobs.start(tiny_config, [], tmp_path / "stopped", None, "cpu", stop=stop)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"] is False
    assert (folder / "report.html").exists()
    jobs.resume(folder, [], "cpu", stop=StopRequest())
    assert read_results(folder) == read_results(finished)


def test_a_checkpoint_of_another_config_is_refused(finished, capsys):
    assert main(["--resume", str(finished), "prompt=make it blue"]) == 2
    *_, error = capsys.readouterr().err.splitlines()  # below the lines with which a run begins
    assert error.startswith("error: ")
    assert "prompt: the checkpoint belongs to a run with" in error


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prompt=", "prompt"),
        ("scene.path=/nowhere", "scene.path"),
        ("prior.model=/nowhere", "prior.model"),
        ("update.method=magic", "csd_edit"),
        ("compare=[magic]", "csd_edit"),
        ("update.fit.patch_size=64", "patch_size"),
        ("update.edit.steps=1", "update.csd_edit"),
        ("reconstruct.steps=many", "reconstruct.steps"),
        ("reconstruct.learning_rate=-1", "learning_rate"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(tiny_config, tmp_path, capsys, override, said):
    folder = tmp_path / "out"
    assert main(["--config", str(tiny_config), "--output", str(folder), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not folder.exists()


def test_losses_that_are_not_finite_stop_the_run_and_name_the_checkpoint(tiny_config, tmp_path, monkeypatch):
    from csd3d.representations import hashgrid as scene_model

    real = scene_model.fit_loss
    calls = []

    def broken(*arguments):
        loss, report = real(*arguments)
        calls.append(1)
        return (loss * float("nan") if len(calls) > 10 else loss), report

    monkeypatch.setattr(scene_model, "fit_loss", broken)
    with pytest.raises(InputError, match=r"last good checkpoint is .*reconstruct"):
        jobs.start(tiny_config, [], tmp_path / "out", None, "cpu", stop=StopRequest())


def test_seeds_and_phases_draw_differently(tiny_config, tmp_path):
    config = jobs.read(tiny_config, [])

    def draw(seed, phase):
        job = Job(replace(config, seed=seed), tmp_path, StopRequest(), None)
        return torch.rand((), generator=job.generator(phase)).item()

    drawn = [draw(seed, phase) for seed in (0, 1, 2**32) for phase in ("reconstruct", "in2n")]
    assert len(set(drawn)) == len(drawn)
    assert draw(1, "in2n") == draw(1, "in2n")
