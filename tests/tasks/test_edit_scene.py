"""The whole job on a tiny scene: what it writes, that a killed run ends as an unbroken one, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csd3d import run as jobs
from csd3d.engine.phase import Job
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.priors import Prior
from csd3d.tasks import edit_scene
from launch import main

ROOT = Path(__file__).parents[2]
FIGURES = {"psnr_truth", "ssim_truth", "psnr_outside", "warped_error", "unet_evaluations", "seconds"}


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csd3d.vocabulary.unknown_words", lambda *_: ["a word"])
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
    assert "Warning: a word" in (finished / "report.html").read_text()
    phases = ["reconstruct", "csd_edit", "in2n", "evaluate", "video", "mesh", "report"]
    assert f"7 phases: {', '.join(phases)}" in log
    assert [f"phase {i + 1} of 7: {name}" in log for i, name in enumerate(phases)] == [True] * 7
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
        ("scene.downscale=5", "expected at least 11"),
        ("prior.model=/nowhere", "prior.model"),
        ("editor=magic", "csd_edit"),
        ("compare=[magic]", "csd_edit"),
        ("compare=[{type: csd_edit, rounds: 5}]", "csd_edit is named twice"),
        ("fit.patch_size=64", "fit.patch_size"),
        ("reconstruct={patches: 1, patch_size: 64}", "reconstruct.patch_size"),
        ("editors.csd_edit.steps=1", "editors.csd_edit.later_steps"),
        ("representation=spheres", "hashgrid"),
        ("representation.render.levels=0", "render.levels"),
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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["field.levels=2"], ["field is now representation.field"]),
        (["render.steps=9"], ["render is now representation.render"]),
        (["update.method=in2n"], ["update.method is now editor"]),
        (["update.keep_detail=false"], ["update.keep_detail is now keep_detail"]),
        (["update.fit.steps=3", "update.in2n.edit_rate=3"], ["is now fit", "is now editors.in2n"]),
        (["update.csd_edit.edit.text_scale=3"], ["text_scale is now editors.csd_edit.text_scale"]),
        (["editors.csd_edit.edit.baseline=noise"], ["baseline is now editors.csd_edit.baseline"]),
    ],
)
def test_keys_of_earlier_releases_say_where_they_are_now(tiny_config, tmp_path, capsys, overrides, said):
    assert main(["--config", str(tiny_config), "--output", str(tmp_path / "out"), *overrides]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in said), error


def test_prior_capture_and_photos_are_opened_once_for_all_editors(tiny_config, tmp_path, monkeypatch):
    counts = Counter()

    def counted(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(edit_scene, "load_prior")
    counted(edit_scene, "load_capture")
    counted(Prior, "encode_condition")
    jobs.start(tiny_config, ["reconstruct.steps=4"], tmp_path / "out", None, "cpu", stop=StopRequest())
    assert counts == {"load_prior": 1, "load_capture": 1, "encode_condition": 3}  # two to try them


def test_an_editor_may_run_twice_under_names_of_its_own(tiny_config, tmp_path):
    compare = "compare=[in2n, {type: in2n+shared, noise: shared}]"
    keys = ["reconstruct.steps=4", compare, "editors.in2n.edit_rate=6"]
    folder = jobs.start(tiny_config, keys, tmp_path / "out", None, "cpu", stop=StopRequest())
    results, _ = read_results(folder)
    assert list(results) == ["csd_edit", "in2n", "in2n+shared"]
    assert results["in2n"] != results["in2n+shared"]
    assert "Instruct-NeRF2NeRF, one by one (shared)" in (folder / "report.html").read_text()


def test_a_run_may_be_compared_with_another_editor_later_but_not_change_one(finished, tiny_config, tmp_path, capsys):
    folder = jobs.start(tiny_config, ["compare=[]"], tmp_path / "out", None, "cpu", stop=StopRequest())
    settings = "{type: in2n, edit_rate: 4, ddim_steps: 2}"
    jobs.resume(folder, [f"compare=[{settings}]"], "cpu", stop=StopRequest())
    assert read_results(folder) == read_results(finished)
    assert main(["--resume", str(folder), "compare=[{type: in2n, edit_rate: 5}]"]) == 2
    assert "edit_rate" in capsys.readouterr().err


TOYS = [
    "plugins=[toy_parts]",
    "representation={type: blobs, count: 12}",
    "editor={type: tint, every: 3}",
    "compare=[csd_edit]",
    "fit.patches=0",
    "fit.rays=1",
    "export.mesh.threshold=2",
]


def test_an_editor_and_a_representation_from_outside_run_by_their_names(tiny_config, tmp_path):
    folder = jobs.start(tiny_config, TOYS, tmp_path / "whole", None, "cpu", stop=StopRequest())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert list(metrics["results"]) == ["tint", "csd_edit"]
    assert metrics["results"]["tint"]["unet_evaluations"] == 0
    assert "Tinted in turn" in (folder / "report.html").read_text()
    assert (folder / "mesh" / "mesh.glb").stat().st_size > 100
    blobs = [json.loads(line)["blobs"] for line in (folder / "curves/reconstruct/curves.jsonl").open()]
    assert (blobs[0], blobs[-1]) == (12, 24)  # it grew, and yet:
    stop = StopRequest()
    stop.requested = True
    stopped = jobs.start(tiny_config, TOYS, tmp_path / "stopped", None, "cpu", stop=stop)
    jobs.resume(stopped, [], "cpu", stop=StopRequest())
    assert read_results(stopped) == read_results(folder)
    jobs.resume(folder, [], "cpu", stop=StopRequest())  # from checkpoints that hold more than a new scene has
    assert read_results(stopped) == read_results(folder)


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


def test_seeds_and_phases_draw_differently(tiny_config):
    config = jobs.read(tiny_config, [])

    def draw(seed, phase):
        job = Job(config=replace(config, seed=seed), device=torch.device("cpu"))
        return torch.rand((), generator=job.generator(phase)).item()

    drawn = [draw(seed, phase) for seed in (0, 1, 2**32) for phase in ("reconstruct", "in2n")]
    assert len(set(drawn)) == len(drawn)
    assert draw(1, "in2n") == draw(1, "in2n")


def test_the_mean_of_reports_that_do_not_all_have_the_same_values():
    """Correspondence guidance, for one, reports its loss at some of its steps only."""
    assert edit_scene.means([{"t": 3.0}, {"t": 1.0, "loss": 4.0}]) == {"t": 2.0, "loss": 4.0}
