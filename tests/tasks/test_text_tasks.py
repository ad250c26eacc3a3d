"""Text to image and to 3D as a user runs them, on a tiny random prior: what is left behind, and resuming."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_jobs import start
from tiny_models import save_tiny_pipeline

from csd3d import run as jobs
from csd3d.config import to_yaml
from csd3d.errors import InputError
from csd3d.evaluation.text import Judge
from csd3d.guidance.methods import Guide
from csd3d.interrupt import StopRequest
from csd3d.priors import PriorConfig, load_prior
from csd3d.run import read
from csd3d.schema import Chosen
from csd3d.tasks.text_to_image import SourceConfig, TextToImageConfig


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
distill: {{steps: 4}}
methods: {{sdi: {{grid: 2}}}}
save_seconds: 0
""")
    return path


@pytest.fixture
def edit_config(tiny_text_prior, tmp_path):
    """Of a picture wider than high."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source.png")
    path = tmp_path / "edit.yaml"
    path.write_text(f"""
task: text_to_image
prompt: a red chair
source: {{image: {tmp_path / "source.png"}, prompt: a blue ball}}
method: [pds+csd, dds]
particles: 2
size: 32
prior: {{model: {tiny_text_prior}}}
distill: {{steps: 4}}
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
  representation:
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


@pytest.mark.parametrize("kind", ["image_config", "edit_config", "asset_config"])
def test_a_stopped_run_resumes_to_the_same_pictures(kind, request, tmp_path, monkeypatch):
    """VSD's network, SDI's noise, FSD's map, the source of PDS, averages and milestones included."""
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
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png") == 3 * 2 * 2
    assert 'href="images/grid.png"' in report
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["prompts"] == ["a red chair", "a blue ball"]
    evaluations = {name: r["unet_evaluations"] for name, r in metrics["results"].items()}
    # 2 prompts × 4 steps × 2 particles: null and text; SDI inverts through at most 3 levels; VSD asks and trains ε_φ
    assert evaluations["csd"] == 32
    assert evaluations["vsd"] == 16 * (2 + 1 + 1)
    assert 32 < evaluations["sdi"] <= 32 + 96


def test_pixels_are_distilled_through_the_encoder(image_config, tmp_path):
    folder = start(image_config, tmp_path / "run", "method=[sds, fsd]", "space=pixel")
    for name in ("sds", "fsd"):  # whose fixed noise is the latents'
        assert len(list((folder / "images" / name).iterdir())) == 4
    with pytest.raises(InputError, match="space is pixel"):
        start(image_config, tmp_path / "other", "space=pixel")


def test_particles_move_away_from_a_source_that_stays_where_they_started(edit_config, tmp_path, monkeypatch):
    seen, step = [], Guide.step

    def seeing(self, z, at, generator, **context):
        seen.append((at, z.detach().clone(), context["source"].clone()))
        return step(self, z, at, generator, **context)

    monkeypatch.setattr(Guide, "step", seeing)
    broken_and_resumed(edit_config, tmp_path / "run", monkeypatch, 2)
    assert [at for at, _, _ in seen] == [0, 1, 2, 3] * 2
    first = seen[0][1]
    assert torch.equal(first[0], first[1])
    assert all(torch.equal(source, first) for _, _, source in seen)
    assert [torch.equal(z, first) for _, z, _ in seen] == [True, False, False, False] * 2


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_an_edit_to_what_the_source_shows_already_leaves_it(edit_config, tiny_text_prior, tmp_path, space):
    """By plain descent, with DDS and PDS: the middle square of the source, through the VAE where that is distilled."""
    keys = ["prompt=a blue ball", "method=[dds, pds, sds]", f"space={space}", "distill.weight=x0"]
    folder = start(edit_config, tmp_path / "run", *keys)
    expected = np.asarray(Image.open(tmp_path / "source.png"), dtype=np.float32)[:, 8:40] / 255
    if space == "latent":
        prior = load_prior(PriorConfig(model=str(tiny_text_prior), device="cpu"), require="text")
        z = prior.encode(torch.from_numpy(expected).permute(2, 0, 1)[None])
        expected = prior.decode(z, (32, 32))[0].permute(1, 2, 0).detach().numpy()
    for name, stays in (("dds", True), ("pds", True), ("sds", False)):
        for number in range(2):
            made = np.asarray(Image.open(folder / "images" / name / f"{number:03}.png"), dtype=np.float32) / 255
            assert (np.abs(made - expected).max() < 0.01) == stays
    evaluations = {
        m: r["unet_evaluations"] for m, r in json.loads((folder / "metrics.json").read_text())["results"].items()
    }
    assert evaluations == {"dds": 32, "pds": 32, "sds": 16}
    grid = np.asarray(Image.open(folder / "images" / "grid.png"))
    assert grid.shape[0] == 4 * 32
    source = np.asarray(Image.open(tmp_path / "source.png"))[:, 8:40]
    assert np.array_equal(grid[:32, -64:], np.concatenate([source, source], 1))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["source.image=", "source.prompt=", "method=[sds, dds]"], r"method 'dds' edits a source.* source\.image"),
        (["source.image="], r"source: prompt is 'a blue ball', but there is no image"),
        (["source.image=nowhere.png"], r"source\.image: nowhere\.png: no such picture"),
        (["size=40"], r"source\.image: .*source\.png: 48x32 pixels; give a picture of at least 40 a side"),
        (["distill.noise=inverted"], "choose one of independent, shared, camera"),
        (["methods.pds.psi=-1", "method=[pds]"], "psi is -1"),
        (["method=[dds]", "distill.svgd={}"], r"distill\.svgd is set, but dds does not collaborate"),
        (["distill.svgd=null"], r"distill\.svgd is null, but pds\+csd collaborates"),
        (["method=[sds+vsd]"], "after the \\+ stands csd"),
        (["distill.switch=0.8"], "methods.bridge.switch=0.8"),
        (["method=[sds]", "distill.perp_neg=true"], r"distill\.perp_neg is for views"),
        (["method=[cfd+csd]", "methods.cfd.fresh=0.1"], r"methods\.cfd\.fresh is for surfaces, a picture has none"),
        (["method=[csd_edit]"], "use task edit_scene"),
        (["method=[{type: csd, weight: 3}]"], r"method\[0\]\.weight: unknown key; csd has none"),
        (["method=[nfsd, {type: nfsd, negative_prompt: b}]"], "nfsd twice, with other settings"),
        (["clip=/nowhere"], "'/nowhere' is no folder"),
    ],
)
def test_edits_that_cannot_be_are_refused_before_a_folder_is_made(edit_config, tmp_path, keys, said):
    with pytest.raises(InputError, match=said):
        start(edit_config, tmp_path / "run", *keys)
    assert not (tmp_path / "run").exists()


def test_a_config_that_edits_asks_for_a_picture(tmp_path):
    config = tmp_path / "edit-image.yaml"
    config.write_text("task: text_to_image\nmethod: [dds]\n")
    with pytest.raises(InputError, match=r"edit-image.*: method 'dds' edits a source.* source\.image"):
        start(config, tmp_path / "run", "prompt=a red chair")


def test_all_methods_are_those_of_a_text_unless_there_is_a_source():
    kept = {"prompt": "a chair", "method": [Chosen("all")]}
    plain, edit = TextToImageConfig(**kept), TextToImageConfig(**kept, source=SourceConfig("chair.png"))
    assert set(edit.runs) - set(plain.runs) == {"dds", "pds", "dvrf", "dreamcatalyst"}


def test_all_methods_find_what_ships_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("task: text_to_image\nprompt: a chair\nmethod: [all]\n")
    config = read(tmp_path / "c.yaml", [])
    assert Path(config.runs["lmc"].method.folder).is_dir()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert list(read(tmp_path / "config.yaml", []).runs) == list(config.runs)


def test_text_to_3d_leaves_meshes_videos_and_a_report(asset_config, tmp_path):
    folder = start(asset_config, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["results"]) == {"vsd+csd", "fsd"}
    assert {p.name for p in (folder / "videos").iterdir()} == {"vsd-csd.mp4", "fsd.mp4"}
    assert (folder / "mesh" / "mesh.glb").stat().st_size > 1000
    assert (folder / "mesh-1" / "mesh.obj").exists()
    assert metrics["mesh"]["base_colour"] == "albedo"  # half of the steps show it lit
    assert metrics["mesh"]["pieces"] >= 1
    assert metrics["mesh"]["stray_faces"] is None  # no right object is known
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list((folder / "images" / "fsd" / "1").iterdir())) == 4
    steps = [json.loads(line) for line in (folder / "curves" / "vsd+csd" / "curves.jsonl").read_text().splitlines()]
    assert {"t", "lora_loss", "kernel_mean", "orientation", "opacity"} <= steps[0].keys()


def test_what_a_method_lacks_is_said_before_a_folder_is_made(image_config, tmp_path):
    with pytest.raises(InputError, match=r"method lmc: folder: .*train_shipped lmc"):
        start(image_config, tmp_path / "run", "method=[lmc]", f"methods.lmc.folder={tmp_path}/nowhere")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="needs an editing model"):
        start(image_config, tmp_path / "run", "method=[csd_edit]")
    with pytest.raises(InputError, match="prompts is empty"):
        start(image_config, tmp_path / "run", "prompts=[]")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("guide.words.unwanted=blurry", "guide.words.unwanted is now methods.nfsd.negative_prompt"),
        ("guide.lora.rank=2", "guide.lora.rank is now methods.vsd.rank"),
        ("distill.inversion_scale=2", "is now methods.sdi.inversion_scale"),
        ("distill.method=vsd", "distill.method is gone: name the method in the key method"),
    ],
)
def test_keys_that_moved_are_told_with_their_new_name(image_config, tmp_path, key, said):
    with pytest.raises(InputError, match=said):
        start(image_config, tmp_path / "run", key)


def test_settings_of_the_hash_grid_have_moved_for_assets(asset_config, tmp_path):
    with pytest.raises(InputError) as caught:
        start(asset_config, tmp_path / "run", "asset.field.levels=2", "asset.render={steps: 9}")
    first, second = str(caught.value).split("\n")
    assert first.endswith("asset.field.levels=2: asset.field is now asset.representation.field")
    assert second.endswith("asset.render is now asset.representation.render")


def test_methods_may_be_added_to_a_run_but_not_changed_in_it(image_config, tmp_path):
    """Each phase's checkpoint depends on its own method's settings, and on those of no other."""
    folder = start(image_config, tmp_path / "run", "method=[vsd]", "prompt=a red chair")
    jobs.resume(folder, ["method=[vsd, sds]"], "cpu", stop=StopRequest())
    assert set(json.loads((folder / "metrics.json").read_text())["results"]) == {"vsd", "sds"}
    with pytest.raises(InputError, match=r"vsd\.learning_rate: the checkpoint belongs to a run with 0\.001"):
        jobs.resume(folder, ["method=[{type: vsd, learning_rate: 0.1}]"], "cpu", stop=StopRequest())


def test_the_shipped_clip_judges_its_own_world_and_words_only(image_config, tiny_text_prior, tmp_path):
    model = shutil.copytree(tiny_text_prior, tmp_path / "model")
    photos = start(image_config, tmp_path / "photos", "method=[sds]", "prompt=a red chair")
    assert json.loads((photos / "metrics.json").read_text())["judge"] is None  # the model is not of the world
    assert "knows only the toy world" in (photos / "log.txt").read_text()
    (model / "csd3d.json").write_text('{"knows": "world"}')
    known = start(image_config, tmp_path / "known", "method=[sds]", "prompt=a red chair", f"prior.model={model}")
    assert json.loads((known / "metrics.json").read_text())["judge"] == "CLIP (world)"
    assert "CLIP (world) similarity to the prompt" in (known / "report.html").read_text()
    other = start(image_config, tmp_path / "other", "method=[sds]", "prompt=a Queen", f"prior.model={model}")
    metrics = json.loads((other / "metrics.json").read_text())
    assert metrics["judge"] is None
    assert metrics["results"]["sds"].keys() == {"seconds", "unet_evaluations"}
    page = (other / "report.html").read_text()
    assert "CLIP" not in page
    assert "Warning: prompt: the model does not know &#x27;queen&#x27;" in page


def test_one_prompt_on_the_command_line_wins(image_config, tmp_path):
    folder = start(image_config, tmp_path / "run", "prompt=a green duck", "method=[sds]")
    assert json.loads((folder / "metrics.json").read_text())["prompts"] == ["a green duck"]
    assert torch.tensor(Image.open(folder / "images" / "grid.png").size).tolist()[1] == 32


def test_an_illusion_is_one_picture_that_each_prompt_sees_turned(tiny_text_prior, tmp_path, monkeypatch):
    """By a method that asks the prior and by CLIP alone, which does not; a stopped run resumes to the same."""
    config = tmp_path / "illusion.yaml"
    config.write_text(f"""
task: text_to_image
prompts: [a red chair, a blue ball]
transforms: [none, rotate_180]
method: [csd, dreamfields]
particles: 2
size: 32
prior: {{model: {tiny_text_prior}}}
distill: {{steps: 3}}
save_seconds: 0
""")
    whole = start(config, tmp_path / "whole")
    shown = [np.asarray(Image.open(whole / "images" / "csd" / f"{k:03d}.png")) for k in range(4)]
    assert all((turned == shown[k][::-1, ::-1]).all() for k, turned in enumerate(shown[2:]))
    results = json.loads((whole / "metrics.json").read_text())["results"]
    assert results["dreamfields"]["unet_evaluations"] == 0 < results["csd"]["unet_evaluations"]
    broken_and_resumed(config, tmp_path / "broken", monkeypatch, 5)
    assert pictures(tmp_path / "broken") == pictures(whole)


def test_a_sketch_is_what_assets_start_as(asset_config, tmp_path, monkeypatch):
    """Before textured backgrounds, by CLIP alone; a stopped run resumes to the same."""
    keys = [
        "sketch.shapes=[{shape: ball, colour: [1, 0, 0]}]",
        "sketch.views=3",
        "sketch.size=16",
        "sketch.fit.steps=2",
    ]
    keys += ["method=dreamfields", "compare=[]", "asset.textured_background=1", "distill.svgd=null", "particles=1"]
    config = tmp_path / "sketch.yaml"
    config.write_text(to_yaml(read(asset_config, keys)))
    whole = start(config, tmp_path / "whole")
    assert json.loads((whole / "metrics.json").read_text())["results"]["dreamfields"]["unet_evaluations"] == 0
    broken_and_resumed(config, tmp_path / "broken", monkeypatch, 3)
    assert pictures(tmp_path / "broken") == pictures(whole)


def test_a_camera_that_the_model_does_not_take_is_refused_before_any_work(asset_config, tmp_path):
    with pytest.raises(InputError, match=r"prompts\.camera: true, but .* takes no camera; set auto or false"):
        start(asset_config, tmp_path / "run", "prompts.camera=true")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"prompts\.camera: expected true or false or one of auto, got"):
        start(asset_config, tmp_path / "run", "prompts.camera=sometimes")


def test_pictures_are_sampled_beside_methods(image_config, tmp_path):
    keys = ["method=[sds]", "sampling={sampler: dpm++, steps: 3}"]
    folder = start(image_config, tmp_path / "run", *keys)
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert list(results) == ["sampled", "sds"]
    assert results["sampled"]["unet_evaluations"] == 2 * 3 * 2 * 2  # prompts, steps, particles, branches
    assert "Sampled, DPM++ (2M)" in (folder / "report.html").read_text()
    assert Image.open(folder / "images" / "grid.png").height == 2 * 32
    alone = start(image_config, tmp_path / "alone", "method=[]", keys[1])
    assert pictures(alone)[Path("images/sampled/003.png")] == pictures(folder)[Path("images/sampled/003.png")]
    with pytest.raises(InputError, match=r"sampled\.sampler: the checkpoint belongs to a run with"):
        jobs.resume(folder, ["sampling.sampler=ddim"], "cpu", stop=StopRequest())


def test_a_prompt_to_prompt_job_draws_both_prompts_from_one_noise(image_config, tmp_path):
    edit = "sampling={steps: 3, prompt_to_prompt: {prompt: a red chair}}"
    folder = start(image_config, tmp_path / "same", "method=[]", "prompt=a red chair", edit)
    found = pictures(folder)
    assert found[Path("images/sampled/001.png")] == found[Path("images/prompt_to_prompt/001.png")]
    evaluations = [r["unet_evaluations"] for r in json.loads((folder / "metrics.json").read_text())["results"].values()]
    assert evaluations == [12, 12]
    keys = ["method=[]", "prompt=a red chair", edit.replace("a red", "a blue")]
    other = pictures(start(image_config, tmp_path / "other", *keys))
    assert other[Path("images/sampled/001.png")] == found[Path("images/sampled/001.png")]
    assert other[Path("images/prompt_to_prompt/001.png")] != found[Path("images/sampled/001.png")]


def test_each_row_of_prompt_to_prompt_is_named_and_judged_by_its_own_prompt(image_config, tmp_path, monkeypatch):
    """The edit stood under the first prompt, and metrics.json did not have the second."""
    judged, score = [], Judge.score_pictures

    def noted(self, pictures, texts, seed):
        judged.append(texts)
        return score(self, pictures, texts, seed)

    monkeypatch.setattr(Judge, "score_pictures", noted)
    prior = save_tiny_pipeline(tmp_path / "prior", "text")
    (prior / "csd3d.json").write_text('{"knows": "world"}')
    keys = [
        "method=[]",
        f"prior.model={prior}",
        "prompt=a red chair",
        "sampling={steps: 1, prompt_to_prompt: {prompt: a blue chair}}",
    ]
    folder = start(image_config, tmp_path / "run", *keys)
    assert judged == [["a red chair"], ["a blue chair"]]
    assert json.loads((folder / "metrics.json").read_text())["prompts"] == ["a red chair", "a blue chair"]
    page = (folder / "report.html").read_text()
    heads = re.findall(r'<div class="cell head"[^>]*>([^<]*)</div>|<h3>([^<]*)</h3>', page)
    assert [head or row for head, row in heads] == ["a red chair", "Sampled, DDIM", "a blue chair", "Prompt-to-Prompt"]
    assert "By CLIP (world), each row by its own prompt." in page


def test_clip_guides_a_sampler_towards_its_text(image_config, tmp_path):
    seen = {}
    for scale in (0, 1):
        keys = ["method=[]", "prompt=a red chair", f"sampling={{steps: 3, classifier_scale: {scale}}}"]
        seen[scale] = pictures(start(image_config, tmp_path / str(scale), *keys))
    assert seen[0] != seen[1]


def test_a_classifier_that_does_not_guide_is_told_in_the_log(image_config, tmp_path):
    told = "sampling.classifier is set, but has no effect: sampling.classifier_scale is 0"
    for scale, times in ((0, 1), (1, 0)):
        sampling = f"sampling={{steps: 1, classifier: csd3d/assets/clip, classifier_scale: {scale}}}"
        run = start(image_config, tmp_path / str(scale), "method=[]", "prompt=a red chair", sampling)
        assert " ".join((run / "log.txt").read_text().split()).count(told) == times


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["method=[]"], "method is empty: name at least one, or give sampling"),
        (["sampling={sampler: heun}"], r"sampling\.sampler: expected one of ddim, euler, dpm\+\+"),
        (["sampling={steps: 0}"], r"sampling\.steps"),
        (["sampling={classifier_scale: 1, classifier: /nowhere}"], r"sampling\.classifier.*'/nowhere' is no folder"),
        (["sampling={classifier_scale: 1, prompt_to_prompt: {}}"], "do not go together"),
        (
            ["sampling={prompt_to_prompt: {align: swap, prompt: a chair}}"],
            r"align: swap needs as many words .* 3 and 2",
        ),
        (["sampling={prompt_to_prompt: {weights: {rod: 2}}}"], r"weights: 'rod' is no word of 'a red chair'; .*'red'"),
        (["sampling={prompt_to_prompt: {cross_steps: 2}}"], r"cross_steps: expected a number from 0 to 1"),
        (["sampling={prompt_to_prompt: {}}", "prior.drop_text_encoder=true"], r"prior\.drop_text_encoder"),
    ],
)
def test_samplings_that_cannot_be_are_refused_before_a_folder_is_made(image_config, tmp_path, keys, said):
    with pytest.raises(InputError, match=said) as caught:
        start(image_config, tmp_path / "run", *keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
