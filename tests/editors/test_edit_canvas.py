"""Edits of canvases: exact priors with known answers; then each task as a user runs it, on a tiny random prior."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from csd3d import run as jobs
from csd3d.canvas.clip import Footage
from csd3d.canvas.latents import Workspace, working_size
from csd3d.canvas.regions import Region, latent_shares, read_mask, region_masks, soft_union
from csd3d.canvas.windows import Cover, Windows, draw_sweep
from csd3d.distillation import CollaborativeEditConfig, SVGDConfig
from csd3d.distillation.edit import Particles, edit_gradient
from csd3d.editors import edit_canvas as edit_2d
from csd3d.editors.edit_canvas import CanvasEditor, CanvasPhase, Edit2dConfig, count_sweeps, take_step
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.media import open_video, read_image, write_frames, write_image
from csd3d.priors import Condition, PriorConfig, load_prior
from csd3d.priors.base import scaled_linear_alphas
from csd3d.tasks.run_2d import overlap_correspondence
from launch import main

EDIT = CollaborativeEditConfig(
    steps=24, lr=1.0, lr_decay=1.0, weight="x0", schedule="annealed", t_max=0.8, noise="shared", text_scale=1.0,
    image_scale=1.0, svgd=None,
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class ExactPrior:
    """Knows N(source, s²) without an instruction, and N(c, s²) under the instruction "c", a number; counts its rows."""

    device, num_train_timesteps = torch.device("cpu"), 1000

    def __init__(self, std=0.1):
        self.alphas_cumprod, self.std, self.unet_evaluations = scaled_linear_alphas().float(), std, 0

    def condition(self, prompts):
        return Condition(torch.tensor([float(prompt or "nan") for prompt in prompts])[:, None, None])

    def predict_noise(self, z_t, t, condition):
        self.unet_evaluations += len(z_t)
        said = condition.text[:, :, :, None]
        mean = torch.where(said.isnan(), condition.image, said)
        alpha_bar = self.alphas_cumprod[t].item()
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return math.sqrt(1 - alpha_bar) * (z_t - math.sqrt(alpha_bar) * mean) / variance


def canvas_of(z):
    codec = SimpleNamespace(to_condition=lambda latents: latents, wrap=False)
    return Workspace(footage=None, size=None, codec=codec, z=z)


def edited(editor, cover, edit=EDIT, roll=0):
    """All sweeps of an edit, without the job about it; `roll`: windows drawn alike on a canvas rolled so far."""
    z = editor.work.z.clone()
    phase = CanvasPhase(seeded(), z=z, moved=torch.zeros_like(z))
    for number in range(edit.steps):
        sweep = draw_sweep(cover, seeded(number))
        sweep = replace(sweep, windows=replace(sweep.windows, left=(sweep.windows.left + roll) % z.shape[3]))
        for part in range(cover.steps):
            report = take_step(editor, phase, sweep, (number, part, cover.steps), edit, seeded(1000 + number))
            assert not report["skipped"]
        phase.z += phase.moved
        phase.moved.zero_()
    return phase.z


# ----------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("svgd", [None, SVGDConfig(bandwidth=10.24, normalize="row", repulsion=0.0)])
def test_regions_end_at_their_own_means(svgd):
    """Inside a region its instruction's mean; outside the source; where they overlap or end, the mix by area."""
    z = torch.randn(1, 4, 16, 40, generator=seeded(7))
    shares = torch.zeros(1, 2, 16, 40)
    shares[0, 0, :, 3:17], shares[0, 1, 4:, 20:38] = 1, 1
    shares[0, :, 4:, 15:17] = 0.5
    shares[0, 0, :, 2] = 0.25
    prior = ExactPrior(std=1e-3)
    editor = CanvasEditor(prior, canvas_of(z), ["0.8", "-0.5"], shares)
    found = edited(editor, Cover((1, 16, 40), (16, 16), batch=8), replace(EDIT, svgd=svgd))
    means = 0.8 * shares[:, :1] - 0.5 * shares[:, 1:]
    expected = means + (1 - shares.sum(1, keepdim=True)) * z
    if svgd is None:
        torch.testing.assert_close(found, expected.expand_as(z), rtol=0, atol=2e-3)
    untouched = (shares.sum(1, keepdim=True) == 0).expand_as(z)
    torch.testing.assert_close(found[untouched], z[untouched], rtol=0, atol=1e-6)
    alone = (shares[:, 1:] == 1).expand_as(z)  # the other instruction, whatever is shared, never comes in here
    drift = edited(CanvasEditor(prior, canvas_of(z), ["-9", "-0.5"], shares), Cover((1, 16, 40), (16, 16), batch=8),
                   replace(EDIT, svgd=svgd))  # fmt: skip
    assert (drift - found)[alone].abs().max() < 2e-3


def test_instructions_are_shared_among_their_own_particles_only():
    """Two windows each: as if the others were not there, scaled by the share; a constant kernel would mix them all."""
    z = torch.randn(4, 4, 8, 8, generator=seeded(3))
    source, eps = torch.randn(2, 4, 4, 8, 8, generator=seeded(4))
    shares = torch.zeros(2, 4, 1, 8, 8)
    shares[0, :2], shares[1, 2:] = 0.75, 1.0
    edit = replace(EDIT, svgd=SVGDConfig(bandwidth=0.0))

    def gradient(rows, texts, shares=None):
        particles = Particles(z[rows], source[rows], eps[rows], shares)
        editor = CanvasEditor(ExactPrior(), canvas_of(z), texts)
        return edit_gradient(editor.predict(particles), particles, 300, torch.arange(len(z[rows])), edit, 0.6)[0]

    found = gradient(slice(None), ["0.8", "-0.5"], shares)
    first, second = gradient(slice(2), ["0.8"]), gradient(slice(2, 4), ["-0.5"])
    back = math.sqrt(0.4 / 0.6) * math.sqrt(0.6 / 0.4) * (z - source)[:2]  # w(t) times the way to the source
    torch.testing.assert_close(found[:2], 0.75 * first + 0.25 * back)
    torch.testing.assert_close(found[2:], second)


def test_rows_without_a_share_are_not_computed():
    """Three windows side by side, a region in one and one in two of them: 2 · 3 shared rows, 1 + 2 of instructions."""
    shares = torch.zeros(1, 2, 8, 24)
    shares[0, 0, :, :4], shares[0, 1, :, 12:20] = 1, 1
    prior = ExactPrior()
    editor = CanvasEditor(prior, canvas_of(torch.zeros(1, 4, 8, 24)), ["1", "2"], shares)
    edited(editor, Cover((1, 8, 24), (8, 8), overlap=0.0), replace(EDIT, steps=1))
    assert prior.unet_evaluations == 2 * 3 + 3


def test_mini_batches_change_nothing_but_who_shares_with_whom():
    """Without collaboration a sweep in seven steps moves every latent as a sweep in one."""
    z = torch.randn(3, 4, 20, 20, generator=seeded(3))
    shapes = {"whole": Cover((3, 20, 20), (16, 16)), "parts": Cover((3, 20, 20), (16, 16), batch=2)}
    assert shapes["parts"].steps == 6
    prior = ExactPrior(std=0.5)
    found = {name: edited(CanvasEditor(prior, canvas_of(z), ["0.3"]), cover, replace(EDIT, steps=3))
             for name, cover in shapes.items()}  # fmt: skip
    torch.testing.assert_close(found["parts"], found["whole"], rtol=0, atol=1e-5)
    assert prior.unet_evaluations == 2 * 3 * 12 * 3


def test_one_window_is_the_edit_of_one_latent():
    """A canvas that fits is a particle like any other: `collaborative_edit`'s answer, to the bit."""
    from csd3d.distillation.edit import edit_step

    z = torch.randn(1, 4, 8, 8, generator=seeded(3))
    prior, edit = ExactPrior(), replace(EDIT, steps=3)
    editor = CanvasEditor(prior, canvas_of(z), ["0.3"])
    expected = z.clone()
    for number in range(3):
        predict = editor.predict(Particles(z, z, z))
        expected, _ = edit_step(predict, expected, z, number, edit, prior.alphas_cumprod, seeded(1000 + number))
    torch.testing.assert_close(edited(editor, Cover((1, 8, 8), (8, 8)), edit), expected, rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def random_prior(tiny_prior):
    return load_prior(PriorConfig(model=str(tiny_prior)))


@pytest.mark.parametrize("svgd", [None, SVGDConfig()])
def test_rolling_a_panorama_that_closes_rolls_its_edit(random_prior, svgd):
    """To the bit, when the windows are drawn alike: nothing knows where the picture's border was."""
    z = torch.randn(1, 4, 4, 16, generator=seeded(3))
    cover, edit = Cover((1, 4, 16), (4, 4), wrap=True), replace(EDIT, steps=2, svgd=svgd)
    found = edited(CanvasEditor(random_prior, canvas_of(z), ["paint it red"]), cover, edit)
    rolled = edited(CanvasEditor(random_prior, canvas_of(z.roll(5, 3)), ["paint it red"]), cover, edit, roll=5)
    assert (found - z).abs().max() > 0.1
    assert torch.equal(rolled, found.roll(5, 3))


def test_windows_share_where_they_overlap_on_their_own_frame():
    windows = Windows(*torch.tensor([[0, 0, 1], [0, 0, 0], [0, 3, 3]]), (4, 4))
    shared = overlap_correspondence(windows, None).validity.mean((2, 3))
    assert shared.tolist() == [[1, 0.25, 0], [0.25, 1, 0], [0, 0, 1]]
    closed = overlap_correspondence(windows, 6).validity.mean((2, 3))  # 3..6 on a circle of 6 is 3, 4, 5, 0
    assert closed[0].tolist() == [1, 0.5, 0]


def test_steps_cost_the_same_and_every_latent_gets_its_passes():
    config = Edit2dConfig(prompt="x", edit=EDIT, passes=10)
    one = Cover((24, 16, 16), (16, 16), batch=24)
    assert count_sweeps(config, one) == 24
    assert count_sweeps(config, replace(one, shape=(48, 16, 16))) == 12  # the same 24 steps, of 24 windows each
    assert count_sweeps(config, replace(one, shape=(240, 16, 16))) == 10
    assert count_sweeps(replace(config, passes=0), replace(one, shape=(240, 16, 16))) == 2


# ------------------------------------------------------------------------------------------------------------ regions


def test_shares_are_areas_and_overlaps_are_divided():
    masks = region_masks([Region("a", box=[0, 0, 12, 16]), Region("b", box=[8, 0, 20, 16])], 16, 20)
    shares = latent_shares(masks, (16, 20), (2, 3), 8)
    torch.testing.assert_close(shares[0, 0], torch.tensor([1.0, 0.5 / 1.5, 0.0]))
    torch.testing.assert_close(shares[1, 0], torch.tensor([0.0, 1.0 / 1.5, 1.0]))  # what is padded is inside too
    halves = latent_shares(region_masks([Region("a"), Region("b")], 16, 20), (16, 20), (2, 3), 8)
    torch.testing.assert_close(halves[:, 0], torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]]))


def test_masks_that_are_the_same_are_mixed_evenly(caplog):
    masks = region_masks([Region("a", box=[0, 0, 8, 8]), Region("b", box=[-3, -3, 8, 8])], 16, 16)
    shares = latent_shares(masks, (16, 16), (2, 2), 8)
    assert shares[:, 0, 0].tolist() == [0.5, 0.5]
    assert shares.sum() == 1
    assert "regions 1 and 2 are the same" in caplog.text


def test_the_result_outside_is_the_source_and_fades_inside():
    inside = soft_union(region_masks([Region("a", box=[0, 0, 20, 30])], 30, 40))
    assert (inside[:, 20:] == 0).all()
    assert (inside[:, :17] == 1).all()  # no fading at the picture's own border
    assert inside[5, 16:20].diff().max() < 0
    assert inside[5, 19] > 0.5


def save_mask(path, height, width, box):
    mask = np.zeros((height, width, 3), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    write_image(path, mask)
    return str(path)


def test_a_mask_of_another_size_is_brought_to_the_pictures(tmp_path):
    small = read_mask(save_mask(tmp_path / "m.png", 12, 20, (5, 0, 10, 12)), 48, 80)
    assert small.shape == (48, 80)
    torch.testing.assert_close(small.mean(), torch.tensor(0.25), rtol=0, atol=0.01)
    with pytest.raises(InputError, match=r"regions: mask .*: it is 20x12, for a picture of 80x80"):
        read_mask(str(tmp_path / "m.png"), 80, 80)
    with pytest.raises(InputError, match=r"regions: mask .*: it is empty"):
        read_mask(save_mask(tmp_path / "e.png", 8, 8, (0, 0, 0, 0)), 8, 8)


@pytest.mark.parametrize(
    ("box", "said"), [([5, 5, 5, 9], "is empty"), ([9, 0, 12, 4], "outside"), ([-4, -4, 0, 3], "outside")]
)
def test_boxes_that_miss_are_refused(box, said):
    with pytest.raises(InputError, match=said):
        region_masks([Region("a", box=box)], 8, 9)


# ------------------------------------------------------------------------------------------------------- working size


@pytest.mark.parametrize(
    ("size", "wrap", "expected"),
    [
        ((128, 128), False, (128, 128)),
        ((64, 32), False, (128, 64)),  # fits: enlarged in one piece
        ((1, 1), False, (128, 128)),
        ((1, 100), False, (8, 128)),
        ((100, 300), False, (128, 384)),  # narrower than a window: enlarged until it is not
        ((653, 1920), False, (653, 1920)),
        ((130, 501), True, (130, 504)),
    ],
)
def test_pictures_are_worked_on_at_a_size_that_the_prior_knows(size, wrap, expected):
    footage = Footage("x", 1, *size, read=None)
    assert working_size(footage, 16, 8, wrap) == expected


def test_what_is_too_narrow_is_refused():
    with pytest.raises(InputError, match="too narrow"):
        working_size(Footage("thread.png", 1, 1, 30_000, read=None), 16, 8, False)


# ------------------------------------------------------------------------------------------------------- as a user runs


@pytest.fixture(scope="module")
def base(tiny_prior):
    return f"""
prior: {{model: {tiny_prior}}}
edit: {{steps: 3, batch: 4}}
passes: 2
baselines: {{sampling: {{steps: 2}}}}
save_seconds: 0
"""


@pytest.fixture
def config_of(base, tmp_path):
    def write(task, text=""):
        path = tmp_path / f"{task}.yaml"
        path.write_text(f"task: {task}\nname: {task}\n{base}{text}")
        return path

    return write


def start(config, folder, *overrides, stop=None):
    return jobs.start(config, list(overrides), folder, None, "cpu", stop=stop or StopRequest())


def noise_picture(path, height, width, **options):
    values = np.random.default_rng(0).random((height, width, 3)).astype(np.float32)
    write_image(path, values, **options)
    return values


@pytest.mark.parametrize(("height", "width"), [(64, 40), (5, 3), (70, 133), (9, 200)])
def test_pictures_of_any_size_come_back_in_it(config_of, tmp_path, height, width):
    noise_picture(tmp_path / "in.png", height, width)
    folder = start(config_of("edit_image"), tmp_path / "run", f"image={tmp_path}/in.png", "prompt=a red it")
    assert Image.open(folder / "result.png").size == (width, height)
    assert Image.open(folder / "images" / "before.png").size == (width, height)
    for name in ("report.html", "images/views.png", "images/preview-csd_edit.png"):
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
    write_frames(tmp_path / "in.mp4", frames, fps=12.5)
    folder = start(
        config_of("edit_video"), tmp_path / "run", f"video={tmp_path}/in.mp4", "prompt=red", "compare=[ip2p]"
    )
    for name in ("result.mp4", "videos/ip2p.mp4"):
        with open_video(folder / name) as video:
            assert (video.count, video.height, video.width, video.fps) == (7, 34, 50, 12.5)
    assert (folder / "videos" / "before-after-csd_edit.mp4").stat().st_size > 500
    for figures in json.loads((folder / "metrics.json").read_text())["results"].values():
        assert figures["flow_warped_error"] > 0 < figures["neighbour_distance"]


def test_frames_share_along_the_flow(config_of, tmp_path):
    config = config_of("edit_video", "world: {height: 64, frames: 4}\nprompt: red\ncorrespondence: flow")
    folder = start(config, tmp_path / "run")
    steps = [json.loads(line) for line in (folder / "curves" / "csd_edit" / "curves.jsonl").read_text().splitlines()]
    assert len(steps) == 2 * 9  # nine places of all four frames
    assert all(0.2 < step["shared_pixels"] < 1 for step in steps)


@pytest.mark.parametrize("count", [1, 9])
def test_a_step_of_a_video_costs_the_same_whatever_its_length(config_of, tmp_path, count):
    folder = start(config_of("edit_video"), tmp_path / "run", "prompt=paint it red", f"world.frames={count}",
                   "world.height=32", "passes=0")  # fmt: skip
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
    stop, step, calls = StopRequest(), edit_2d.take_step, []

    def counted(*arguments):
        calls.append(1)
        stop.requested = len(calls) == 2
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(edit_2d, "take_step", counted)
        start(config, tmp_path / "broken", stop=stop)
    assert len(calls) == 2
    assert not json.loads((tmp_path / "broken" / "metrics.json").read_text())["finished"]
    jobs.resume(tmp_path / "broken", [], "cpu", stop=StopRequest())
    assert outputs(tmp_path / "broken") == outputs(whole)


@pytest.mark.parametrize(
    ("task", "override", "said"),
    [
        ("edit_image", "prompt=", "prompt is empty"),
        ("edit_image", "image=/nowhere.png", "/nowhere.png: no such file"),
        ("edit_image", "correspondence=flow", "flow is for videos"),
        ("edit_image", "correspondence=depth", "choose none, overlap or flow"),
        ("edit_image", "compare=[pix2video]", "which edits videos"),
        ("edit_image", "compare=[magic]", "choose among"),
        ("edit_image", "regions=[{prompt: b}]", "prompt and regions are both given"),
        ("edit_image", "window=0", "window is 0"),
        ("edit_image", "world.width=0", "world: width is 0"),
        ("edit_image", "tile_pixels=10", "tile_pixels"),
        ("edit_image", "captions=[a duck]", "give two, of the source and of its edit"),
        ("edit_panorama", "overlap=1.5", "overlap is 1.5"),
        ("edit_video", "video=/nowhere.mp4", "/nowhere.mp4: no such file"),
        ("edit_video", "image=a.png", "did you mean"),
        ("edit_video", "prior.model=/nowhere", "prior.model"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(config_of, tmp_path, capsys, task, override, said):
    folder = tmp_path / "out"
    config = config_of(task, "prompt: red\nworld: {width: 32, height: 32, frames: 2}")
    assert main(["--config", str(config), "--output", str(folder), override]) == 2
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
