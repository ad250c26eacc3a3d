"""Edits of pictures, panoramas and videos as a user runs them, on a tiny random prior."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import start

from csd3d import registry
from csd3d import run as jobs
from csd3d.editors.csd_edit_canvas import CSDEditCanvas
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.media import encode, open_video, read_image, write_image
from launch import main


@pytest.fixture(scope="module")
def base(tiny_prior):
    return f"""
prior: {{model: {tiny_prior}}}
editors: {{csd_edit: {{text_scale: 3, image_scale: 1, passes: 2, edit: {{steps: 3, batch: 4}}}}}}
sampling: {{steps: 2}}
save_seconds: 0
"""


SMALL = "world: {width: 32, height: 32, frames: 2}\n"


@pytest.fixture
def config_of(base, tmp_path):
    def write(task, text=""):
        path = tmp_path / f"{task}.yaml"
        path.write_text(f"task: {task}\nname: {task}\n{base}{text}")
        return path

    return write


def noise_picture(path, height, width, **options):
    values = np.random.default_rng(0).random((height, width, 3)).astype(np.float32)
    write_image(path, values, **options)
    return values


def save_mask(path, height, width, box):
    mask = np.zeros((height, width, 3), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    write_image(path, mask)
    return str(path)


@pytest.mark.parametrize(("height", "width"), [(64, 40), (5, 3), (70, 133), (9, 200)])
def test_pictures_of_any_size_come_back_in_it(config_of, tmp_path, height, width, monkeypatch):
    monkeypatch.setattr("csd3d.vocabulary.unknown_words", lambda *_: ["a word"])
    noise_picture(tmp_path / "in.png", height, width)
    folder = start(config_of("edit_image"), tmp_path / "run", f"image={tmp_path}/in.png", "prompt=a red it")
    assert Image.open(folder / "result.png").size == (width, height)
    assert Image.open(folder / "images" / "before.png").size == (width, height)
    assert "Warning: a word" in (folder / "report.html").read_text()
    for name in ("images/views.png", "images/preview-csd_edit.png"):
        assert (folder / name).stat().st_size > 100
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["results"]["csd_edit"]["unet_evaluations"] >= 9
    assert {"encode", "edit", "export", "total"} <= metrics["seconds"].keys()


def test_alpha_and_sixteen_bits_are_kept(config_of, tmp_path):
    alpha = np.linspace(0, 1, 32, dtype=np.float32)[None].repeat(32, 0)
    noise_picture(tmp_path / "in.png", 32, 32, alpha=alpha, bits=16)
    folder = start(config_of("edit_image"), tmp_path / "run", f"image={tmp_path}/in.png", "prompt=red")
    found = read_image(folder / "result.png")
    assert found.bits == 16
    np.testing.assert_allclose(found.alpha, alpha, atol=1e-4)


def test_panorama_with_its_truth_and_baselines(config_of, tmp_path):
    config = config_of("edit_panorama", "world: {width: 128, height: 32}\nprompt: paint it a bright colour\nwrap: true")
    folder = start(config, tmp_path / "run", "compare=[ip2p, ip2p_multidiffusion, ip2p_downscaled]")
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert list(results) == ["csd_edit", "ip2p", "ip2p_multidiffusion", "ip2p_downscaled"]
    for name, figures in results.items():
        assert figures["psnr_truth"] > 5
        assert figures["answer"] in (0, 1, 2)
        assert figures["seam_visibility"] > 0 < figures["seam_visibility_relative"]
        assert name == "csd_edit" or Image.open(folder / "images" / f"{name}.png").size == (128, 32)
    page = (folder / "report.html").read_text()
    assert "InstructPix2Pix with MultiDiffusion" in page
    assert "PSNR against the truth" in page


def test_regions_from_the_command_line_leave_the_outside_alone(config_of, tmp_path):
    source = noise_picture(tmp_path / "in.png", 40, 64)
    save_mask(tmp_path / "mask.png", 20, 32, (0, 0, 8, 20))
    regions = f"regions=[{{mask: {tmp_path}/mask.png, prompt: red}}, {{box: [40, 8, 60, 30], prompt: blue}}]"
    folder = start(config_of("edit_image"), tmp_path / "run", f"image={tmp_path}/in.png", regions)
    result = read_image(folder / "result.png").rgb
    outside = np.ones((40, 64), bool)
    outside[:, :17], outside[8:30, 40:60] = False, False
    assert np.abs(result - source)[outside].max() <= 0.5 / 255
    assert np.abs(result - source)[8:30, 44:56].mean() > 0.02
    figures = json.loads((folder / "metrics.json").read_text())["results"]["csd_edit"]
    assert figures["psnr_outside"] > 55
    assert "psnr_outside_vae" in figures


def test_strips_of_the_world_know_their_truth(config_of, tmp_path):
    text = "world: {width: 96, height: 32}\nregions: [{prompt: paint it red}, {prompt: ''}, {prompt: make it night}]"
    folder = start(config_of("edit_image", text), tmp_path / "run")
    assert json.loads((folder / "metrics.json").read_text())["results"]["csd_edit"]["psnr_truth"] > 5


def test_a_video_keeps_its_size_count_and_rate(config_of, tmp_path):
    frames = (np.random.default_rng(0).random((7, 34, 50, 3)) * 255).astype(np.uint8)
    encode(tmp_path / "in.mp4", frames, fps=12.5)
    folder = start(
        config_of("edit_video"), tmp_path / "run", f"video={tmp_path}/in.mp4", "prompt=red", "compare=[ip2p]"
    )
    for name in ("result.mp4", "videos/ip2p.mp4"):
        with open_video(folder / name) as video:
            assert (video.count, video.height, video.width, video.fps) == (7, 34, 50, 12.5)
    assert (folder / "videos" / "before-after-csd_edit.mp4").stat().st_size > 500
    for figures in json.loads((folder / "metrics.json").read_text())["results"].values():
        assert figures["flow_warped_error"] > 0 < figures["neighbour_distance"]


@pytest.mark.parametrize("count", [1, 9])
def test_a_step_of_a_video_costs_the_same_whatever_its_length(config_of, tmp_path, count):
    folder = start(config_of("edit_video"), tmp_path / "run", "prompt=paint it red", f"world.frames={count}",
                   "world.height=32", "editors.csd_edit.passes=0")  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())["results"]["csd_edit"]
    assert metrics["unet_evaluations"] == {1: 3 * 3, 9: 3 * 9}[count]
    assert metrics["psnr_truth"] > 5
    with open_video(folder / "result.mp4") as video:
        assert (video.count, video.height, video.width) == (count, 32, 32)


CASES = {
    "edit_panorama": "world: {width: 96, height: 48}\nprompt: red\ncompare: [ip2p]\noverlap: 0.5",
    "edit_image": "world: {width: 64, height: 32}\nregions: [{prompt: red}, {prompt: blue}]\nwindow: 3",
    "edit_video": "world: {height: 48, frames: 3}\nprompt: red",
}


def outputs(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    for figures in metrics["results"].values():
        figures.pop("seconds")
    pictures = {
        p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("**/*.png")) if "preview" not in p.name
    }
    return metrics["results"], pictures


@pytest.mark.parametrize("task", CASES)
def test_a_stopped_run_resumes_to_the_same_bits(config_of, tmp_path, monkeypatch, task):
    """Stopped after its second step, in the middle of a sweep where that takes several."""
    config = config_of(task, CASES[task])
    whole = start(config, tmp_path / "whole")
    stop, step, calls = StopRequest(), CSDEditCanvas.take_step, []

    def counted(*arguments):
        calls.append(1)
        stop.requested = len(calls) == 2
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CSDEditCanvas, "take_step", counted)
        start(config, tmp_path / "broken", stop=stop)
    assert len(calls) == 2
    assert not json.loads((tmp_path / "broken" / "metrics.json").read_text())["finished"]
    jobs.resume(tmp_path / "broken", [], "cpu", stop=StopRequest())
    assert outputs(tmp_path / "broken") == outputs(whole)


@pytest.mark.parametrize(
    ("task", "override", "said"),
    [
        ("edit_image", "prompt=", "prompt is empty"),
        ("edit_image", "image=/nowhere.png", "image: /nowhere.png: no such file"),
        ("edit_image", "compare=[pix2video]", "edits videos"),
        ("edit_image", "editor={type: ip2p, steps: 3} & compare=[{type: ip2p, steps: 4}]", "ip2p is named twice"),
        ("edit_image", "editor={type: ip2p, stepz: 3}", "editor.stepz: unknown key; did you mean editor.steps?"),
        ("edit_image", "editor=3", "editor: expected the name of one of"),
        ("edit_image", "editor=", "editor: expected the name of one of"),
        ("edit_image", "clip=/nowhere", "clip: CLIP: '/nowhere' is no folder"),
        ("edit_image", "plugins=3", "plugins: expected a list"),
        ("edit_image", "compare=[magic]", "unknown canvas_editor 'magic'"),
        ("edit_image", "sampling.start=1.5", "start is 1.5"),
        ("edit_image", "sampling.sampler=heun", "sampling.sampler: expected one of ddim, euler, dpm++, got"),
        ("edit_video", "sampling.sampler=dpm++ & compare=[fatezero]", "undoes: set editors.fatezero.sampler=ddim, or"),
        ("edit_video", "compare=[{type: rave, sampler: euler}]", "editors.rave.sampler is 'euler', but rave, as set"),
        ("edit_image", "editors.ip2p.init=photo", "init is 'photo'"),
        ("edit_image", "edit.steps=3", "edit.steps is now editors.csd_edit.edit.steps"),
        ("edit_image", "edit.text_scale=3", "edit.text_scale is now editors.csd_edit.text_scale"),
        ("edit_image", "baselines.sampling.steps=3", "baselines.sampling is now sampling"),
        ("edit_video", "compare=[fatezero] & prior.drop_text_encoder=true", "fatezero needs the tokenizer"),
        ("edit_video", "baselines.pix2video.pull=0.1", "is gone: Pix2Video guides by its authors' constant"),
        ("edit_image", "regions=[{prompt: b}]", "prompt and regions are both given"),
        ("edit_image", "window=0", "window: expected a whole number from 1 to 1024 or null, got 0"),
        ("edit_image", "world.width=0", "world.width: expected a whole number from 1 to 8192, got 0"),
        ("edit_image", "tile_pixels=10", "tile_pixels"),
        ("edit_image", "captions=[duck]", "give two, of the source and of its edit"),
        ("edit_panorama", "overlap=1.5", "overlap is 1.5"),
        ("edit_video", "video=/nowhere.mp4", "video: /nowhere.mp4: no such file"),
        ("edit_video", "image=a.png", "did you mean"),
        ("edit_video", "prior.model=/nowhere", "prior.model"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(config_of, tmp_path, capsys, task, override, said):
    folder = tmp_path / "out"
    config = config_of(task, "prompt: red\nworld: {width: 32, height: 32, frames: 2}")
    assert main(["--config", str(config), "--output", str(folder), *override.split(" & ")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ("[{prompt: a, box: [0, 0, 4, 4]}, {prompt: b}]", "the one at 2 has neither mask nor box"),
        ("[{prompt: a, box: [0, 0, 4]}]", "x0, y0, x1, y1"),
        ("[{prompt: a, box: [0, 0, 4, 4], mask: m.png}]", "a mask and a box"),
        ("[{prompt: ''}]", "none has a prompt"),
        ("[{prompt: a, mask: /nowhere.png}]", "regions: mask /nowhere.png: no such file"),
        ("[{prompt: a, box: [50, 0, 60, 4]}]", "outside the picture of 32x32"),
        ("[{prompt: a, colour: red}]", "unknown key"),
    ],
)
def test_bad_regions_are_named(config_of, tmp_path, regions, said):
    with pytest.raises(InputError, match=said):
        start(config_of("edit_image", "world: {width: 32, height: 32}"), tmp_path / "out", f"regions={regions}")


def test_the_shipped_configs_are_read():
    root = jobs.PACKAGE_ROOT / "configs"
    for path in sorted(root.glob("*.yaml")):
        config = jobs.read(path, [])
        assert config.name == path.stem
        assert any(getattr(config, key, "") for key in ("instructions", "prompt", "texts"))


# ---------------------------------------------------------------------------------------- editors from outside, counts


def test_an_editor_from_outside_runs_by_its_name_with_keys_and_a_title_of_its_own(config_of, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._entries, "canvas_editor", dict(registry._entries["canvas_editor"]))

    @registry.register("canvas_editor", "brighten", title="Brighter latents")
    @dataclass(frozen=True)
    class Brighten:
        by: float = 1.0

        edits: ClassVar[tuple[str, ...]] = ("picture",)

        def count_steps(self, canvas):
            return 2

        def take_step(self, canvas, phase, step):
            phase.z = phase.z + self.by
            return {"skipped": 0.0}

    config = config_of("edit_image", SMALL + "prompt: red\neditor: {type: brighten, by: 0.5}\ncompare: [ip2p]")
    folder = start(config, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["results"]) == ["brighten", "ip2p"]
    assert metrics["finished"]
    assert metrics["results"]["brighten"]["unet_evaluations"] == 0
    page = (folder / "report.html").read_text()
    assert "Brighter latents" in page
    assert "by: 0.5" in (folder / "config.yaml").read_text()
    with pytest.raises(InputError, match="compare names 'brighten', which, as set, edits pictures"):
        start(config_of("edit_video", SMALL + "prompt: red\ncompare: [brighten]"), tmp_path / "video")


def test_an_editor_twice_under_names_of_its_own(config_of, tmp_path):
    text = SMALL + "prompt: red\ncompare: [ip2p, {type: ip2p+shared, noise: shared, steps: 1}]"
    folder = start(config_of("edit_video", text), tmp_path / "run")
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert results["ip2p"]["unet_evaluations"] == 2 * results["ip2p+shared"]["unet_evaluations"]
    assert "InstructPix2Pix, one by one (shared)" in (folder / "report.html").read_text()
    assert (folder / "videos" / "ip2p+shared.mp4").stat().st_size > 500


def test_another_setting_of_a_compared_editor_is_another_run_but_one_more_editor_is_not(config_of, tmp_path):
    text = SMALL + "prompt: red\ncompare: [{type: ip2p, steps: 1}]"
    folder = start(config_of("edit_image", text), tmp_path / "run")
    with pytest.raises(InputError, match=r"ip2p\.steps: the checkpoint belongs to a run with 1, this one has 2"):
        jobs.resume(folder, ["compare=[{type: ip2p, steps: 2}]"], "cpu", stop=StopRequest())
    jobs.resume(folder, ["compare=[{type: ip2p, steps: 1}, ip2p_downscaled]"], "cpu", stop=StopRequest())
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert list(results) == ["csd_edit", "ip2p", "ip2p_downscaled"]


def test_frames_are_read_once_to_encode_and_once_for_all_results(config_of, tmp_path, monkeypatch):
    demo, read = registry.get("demo", "orbit").thing, []

    def counted(*arguments):
        clip = demo(*arguments)
        frames = clip.read
        clip.read, clip.flow = lambda indices: read.extend(indices) or frames(indices), None
        return clip

    entry = registry.Entry("demo", "orbit", "", counted)
    monkeypatch.setitem(registry._entries["demo"], "orbit", entry)
    for compare in ("[]", "[ip2p, ip2p_multidiffusion, pix2video]"):
        read.clear()
        start(config_of("edit_video", SMALL + f"prompt: red\ncompare: {compare}"), tmp_path / f"run{len(compare)}")
        assert sorted(read) == [0, 0, 1, 1]


def test_a_wide_picture_is_shown_whole_and_its_full_size_linked(config_of, tmp_path):
    text = "world: {width: 96, height: 32}\nprompt: red\ncompare: [ip2p]"
    page = (start(config_of("edit_panorama", text), tmp_path / "run") / "report.html").read_text()
    for file in ("images/before.png", "images/ip2p.png", "result.png"):
        assert f'<a href="{file}"><img' in page
    whole = page[page.index("The whole picture") :]
    assert whole.count('width="96" height="32"') == 3


def test_limits_that_messages_name_are_keys(config_of, tmp_path, capsys):
    """Each limit refuses in one line that names a key, and that key lifts it."""
    noise_picture(tmp_path / "in.png", 40, 64)
    (tmp_path / "frames").mkdir()
    for i in range(4):
        noise_picture(tmp_path / "frames" / f"{i}.png", 32, 32)
    encode(tmp_path / "in.mp4", (np.zeros((32, 32, 3), np.uint8) for _ in range(4)), fps=12)
    limits = {
        "max_pixels=2000": ("edit_image", f"image={tmp_path}/in.png"),
        "max_pixels=1000": ("edit_video", f"video={tmp_path}/frames"),
        "max_frames=3": ("edit_video", f"video={tmp_path}/in.mp4"),
        "max_frames=2": ("edit_video", f"video={tmp_path}/frames"),
        "max_decoded_gib=0.000001": ("edit_video", f"video={tmp_path}/in.mp4"),
        "fps=0": ("edit_video", f"video={tmp_path}/frames"),
    }
    for number, (limit, (task, given)) in enumerate(limits.items()):
        arguments = ["--config", str(config_of(task)), "--output", str(tmp_path / f"run{number}"), "prompt=red", given]
        assert main([*arguments, limit]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert limit.partition("=")[0] in error
        assert not (tmp_path / f"run{number}").exists()


def test_a_folder_of_frames_is_told_its_rate(config_of, tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(2):
        noise_picture(tmp_path / "frames" / f"{i}.png", 32, 32)
    folder = start(config_of("edit_video"), tmp_path / "run", f"video={tmp_path}/frames", "prompt=red", "fps=10")
    with open_video(folder / "result.mp4") as video:
        assert (video.count, video.fps) == (2, 10)
