"""The exact prior: known answers of its score, its banks against the training distribution, and what it refuses."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tiny_jobs import CASES

from csd3d import run as jobs
from csd3d.datasets import SceneConfig, load_capture
from csd3d.distillation.guidance import edit_predictor
from csd3d.distillation.method import Query
from csd3d.editors.scene import SceneSource
from csd3d.errors import InputError
from csd3d.interrupt import StopRequest
from csd3d.priors import PriorConfig, load_prior
from csd3d.priors.camera_embedding import view_embedding
from csd3d.priors.embedding_cache import write_embedding
from csd3d.tasks.edit_scene import EditJob
from csd3d.tasks.text_to_3d import AssetJob
from csd3d.world import exact_prior
from csd3d.world.exact_prior import CELL_DEG, NEAR_DEG, TITLE, ExactPrior, KnownViews, told_camera
from csd3d.world.language import FAMILIES, sample_edit, view_word
from csd3d.world.scene import Scene
from launch import main

SCENE = Scene("cube", "yellow", azimuth_deg=20)  # of `tiny_capture`
BRIGHT = "paint it a bright colour"


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Few and small pictures, and a cache of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SIZE": 32, "WORLD": 5, "PICTURES": 4}.items():
            patch.setattr(exact_prior, name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def prior():
    return load_prior(PriorConfig(model="world:exact", device="cpu"), require="edit")


@pytest.fixture(scope="module")
def text_prior():
    return load_prior(PriorConfig(model="world:exact", device="cpu"), require="text")


@pytest.fixture
def source(prior, tiny_capture):
    found = SceneSource(prior, load_capture(SceneConfig(path=str(tiny_capture))), BRIGHT)
    assert found.image.shape == (5, 4, 4, 4)  # which introduces the views
    return found


def clean_of(prior, z_t, t, eps):
    """ẑ_0 of a prediction."""
    alpha_bar = prior.alphas_cumprod[t]
    return (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def noise(count, seed=0):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 300, 900])
def test_one_right_answer_is_found_from_any_noise(prior, source, t):
    answer = prior.views.latents(replace(SCENE, colour="green"))
    z_t = 3 * noise(5)
    eps = prior.predict({"full": Query(z_t, t, ("make it green",) * 5, source.image)})["full"]
    torch.testing.assert_close(clean_of(prior, z_t, t, eps), answer, rtol=1e-4, atol=1e-3)


def test_near_a_right_answer_it_is_that_one_and_from_noise_it_is_between_them(prior, source):
    answers = torch.stack([prior.views.latents(scene) for scene in prior.views.answers(BRIGHT)])  # [3, 5, ...]
    for number, answer in enumerate(answers):
        z_t = prior.alphas_cumprod[20].sqrt() * answer
        eps = prior.predict_noise(z_t, 20, prior.condition([BRIGHT] * 5, source.image))
        found = clean_of(prior, z_t, 20, eps)
        assert (answers - found).square().flatten(1).mean(1).argmin() == number
        torch.testing.assert_close(found, answer, rtol=1e-3, atol=1e-3)
    prior.alphas_cumprod, kept = torch.full((1000,), 1e-6), prior.alphas_cumprod
    try:
        z_t = noise(5)
        eps = prior.predict_noise(z_t, 999, prior.condition([BRIGHT] * 5, source.image))
    finally:
        prior.alphas_cumprod = kept
    torch.testing.assert_close(eps, z_t - 1e-3 * answers.mean(0), rtol=1e-4, atol=1e-4)


def test_guidance_is_the_sum_of_its_branches(prior, source):
    z_t, t, rows = noise(2), 500, torch.tensor([3, 1])
    predict = edit_predictor(prior.predict, (BRIGHT,) * 2, source.image[rows], 3.0, 1.5)
    eps = {
        name: prior.predict_noise(z_t, t, c)
        for name, c in prior.edit_conditions([BRIGHT] * 2, source.image[rows]).items()
    }
    expected = eps["null"] + 1.5 * (eps["image"] - eps["null"]) + 3 * (eps["full"] - eps["image"])
    torch.testing.assert_close(predict(z_t, t), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(eps["full"], eps["image"], atol=1e-2)
    assert not torch.allclose(eps["null"], eps["image"], atol=1e-2)


def test_rows_of_one_batch_have_their_own_views_prompts_and_timesteps(prior, source):
    z_t, t, prompts = noise(3), torch.tensor([100, 700, 400]), [BRIGHT, "", "make it green"]
    together = prior.predict_noise(z_t, t, prior.condition(prompts, source.image[[4, 0, 2]]))
    for row, view in enumerate((4, 0, 2)):
        alone = prior.predict_noise(z_t[row, None], int(t[row]), prior.condition([prompts[row]], source.image[[view]]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_without_an_instruction_edits_are_as_likely_as_in_training(prior, source):
    """Against 8000 draws of training; and the bank has those weights."""
    shares = prior.views.edits(BRIGHT)
    total = sum(shares.values())
    applying = [family for family in FAMILIES.values() if any(True for _ in family.answers(SCENE))]
    assert total == pytest.approx(sum(family.weight for family in applying))
    rng, drawn = random.Random(0), Counter()
    for _ in range(8000):
        if edit := sample_edit(SCENE, rng):
            drawn[rng.choice(edit.answers)] += 1
    assert drawn.keys() == shares.keys()
    count = drawn.total()
    for scene, share in shares.items():
        share /= total
        assert abs(drawn[scene] / count - share) < 4.5 * (share * (1 - share) / count) ** 0.5
    bank = prior.edit_bank("", 0)
    expected = torch.tensor([share / total for share in shares.values()], dtype=torch.float64)
    torch.testing.assert_close(bank.log_weights.softmax(0), expected)


def test_an_answer_that_training_never_draws_is_as_rare_as_its_rarest():
    both = "make it green and put a red hat on it"
    known = KnownViews(torch.zeros(1, 4, 4, 4), SCENE, lambda scene: torch.zeros(1, 4, 4, 4))
    (answer,), shares = known.answers(both), known.edits(both)
    assert (answer.colour, answer.hat) == ("green", "red")
    assert shares[answer] == min(shares.values())
    assert len(shares) == len(known.edits("make it green")) + 1


@pytest.mark.parametrize("word", ["front view", "back view", "side view, facing left", "side view", "overhead view"])
def test_pictures_of_a_prompt_obey_its_view_word(text_prior, word, monkeypatch):
    seen = []
    monkeypatch.setattr(text_prior, "rendered", lambda scenes, views: seen.extend(zip(scenes, views, strict=True)))
    monkeypatch.setattr(exact_prior, "PICTURES", 20)
    text_prior.text_bank(f"a red duck, {word}")
    words = {view_word(scene, view.azimuth_deg, view.elevation_deg) for scene, view in seen}
    assert all(word in found for found in words)
    assert {(scene.kind, scene.colour, scene.plate) for scene, _ in seen} == {("duck", "red", False)}
    assert len(seen) == 20
    seen.clear()
    text_prior.text_bank(f"a red duck, on a plate, {word}")
    assert all(scene.plate for scene, _ in seen)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "distance"), [(0.0, 20.0, 4.0), (-173.0, 44.0, 3.6), (90.0, -4.0, 4.4), (359.9, 4.9, 4.0)]
)
def test_pictures_of_a_prompt_are_seen_from_near_the_camera(text_prior, monkeypatch, azimuth, elevation, distance):
    """They are numbered here, in place of their latents, to see which are taken."""
    seen = []

    def rendered(scenes, views):
        seen.extend(zip(scenes, views, strict=True))
        return torch.arange(float(len(views)))[:, None]

    monkeypatch.setattr(text_prior, "rendered", rendered)
    monkeypatch.setattr(text_prior, "kept", lambda key, count, make: make())
    monkeypatch.setattr(exact_prior, "PICTURES", 50)
    embedding = view_embedding(torch.tensor([[azimuth, elevation, distance]]), 1, 12, torch.device("cpu"))[0]
    points = text_prior.near("a red duck, front view", *told_camera(embedding))
    taken = [seen[int(number)] for number in points.unique()]
    assert len(taken) == 50
    turns = torch.tensor([(view.azimuth_deg - azimuth + 180) % 360 - 180 for _, view in taken])
    assert turns.abs().max() <= NEAR_DEG + 0.3
    assert turns.abs().min() < 0.3  # they lie on both sides of it
    assert abs(turns.mean()) < 0.5
    for scene, view in taken:
        assert (scene.kind, scene.colour) == ("duck", "red")
        assert abs(view.elevation_deg - elevation) <= CELL_DEG + 1e-3
        assert view.distance == pytest.approx(distance, abs=0.05)


def test_a_ring_serves_all_cameras_of_its_height_whatever_their_word(text_prior, monkeypatch):
    made = []

    def ring(*asked):
        made.append(asked)
        return torch.zeros(60, 3)

    monkeypatch.setattr(text_prior, "ring", ring)
    monkeypatch.setattr(text_prior, "kept", lambda key, count, make: make())
    for word, azimuth in (("front view", 3.0), ("back view", 170.0), ("side view, facing left", -90.0)):
        assert text_prior.near(f"a red duck, on a plate, {word}", azimuth, 18.0, 4.04).shape == (4, 3)
    assert set(made) == {("a red duck, on a plate", 20.0, 4.0)}
    assert told_camera(torch.zeros(12)) is None


def test_a_prompt_and_its_absence_have_their_own_pictures(text_prior):
    z_t, view = noise(1), torch.tensor([[30.0, 20.0, 4.0]])
    asked = {
        "text": Query(z_t, 400, ("a red duck",)),
        "seen": Query(z_t, 400, ("a red duck",), view=view),
        "null": Query(z_t, 400, ("",), view=view),
    }
    found = {name: clean_of(text_prior, z_t, 400, eps) for name, eps in text_prior.predict(asked).items()}
    banks = {
        name: text_prior.bank(text_prior.query_condition(query), z_t.shape[1:]).points for name, query in asked.items()
    }
    assert [len(points) for points in banks.values()] == [4, 4, 5]
    for name, points in banks.items():  # each is a mean of its own pictures
        weights = torch.linalg.lstsq(points.T, found[name].double().flatten()).solution
        torch.testing.assert_close(weights @ points, found[name].double().flatten(), rtol=1e-3, atol=1e-3)
        assert weights.sum() == pytest.approx(1, abs=1e-2)


def points(change):
    """Harm: another bank under the same name and with a right digest."""
    return lambda file, whole, name: write_embedding(file, name, {"points": change(whole["points"].clone())})


HARMS = {
    "empty": lambda file, *_: file.write_bytes(b""),
    "text": lambda file, *_: file.write_bytes(b"no tensors"),
    "cut": lambda file, *_: file.write_bytes(file.read_bytes()[:-9]),
    "other name": lambda file, whole, name: write_embedding(file, name, {"text": whole["points"]}),
    "few": points(lambda x: x[:1]),
    "none": points(lambda x: x[:0]),
    "narrow": points(lambda x: x[:, 1:]),
    "flat": points(lambda x: x.flatten()),
    "not finite": points(lambda x: x.fill_(torch.nan)),
}


@pytest.mark.parametrize("harm", [None, *HARMS.values()], ids=["none at all", *HARMS])
def test_pictures_are_the_same_from_memory_from_the_disk_and_anew(text_prior, harm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key, made = ("text", "a blue ball"), []

    def make():
        made.append(1)
        return text_prior.text_bank("a blue ball")

    first = text_prior.kept(key, 4, make)
    assert text_prior.kept(key, 4, make) is first
    (file,) = tmp_path.rglob("*.safetensors")
    with safe_open(file, "pt") as opened:
        name, whole = opened.metadata()["prompt"], {"points": opened.get_tensor("points")}
    if harm is not None:
        harm(file, whole, name)
    text_prior.points.clear()
    assert torch.equal(text_prior.kept(key, 4, make), first)
    text_prior.points.clear()
    assert torch.equal(text_prior.kept(key, 4, make), first)
    assert len(made) == (1 if harm is None else 2)
    text_prior.points.clear()


@pytest.mark.parametrize("place", ["a file", "a link to nothing", "a long name", "no absolute path"])
def test_a_cache_that_cannot_be_is_a_warning(text_prior, place, tmp_path, monkeypatch, caplog):
    home = tmp_path / ("x" * 300 if place == "a long name" else "home")
    if place == "a file":
        home.write_text("mine")
    elif place == "a link to nothing":
        home.symlink_to(tmp_path / "nothing")
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-here/x" if place == "no absolute path" else str(home))
    text_prior.points.clear()
    with caplog.at_level("WARNING", "csd3d"):
        points = text_prior.kept(("text", "a blue ball"), 4, lambda: text_prior.text_bank("a blue ball"))
    assert len(points) == 4
    text_prior.points.clear()
    kept = [*(tmp_path / "own").rglob("*.safetensors")]
    if place == "no absolute path":  # which is as if it were not set
        assert (len(kept), caplog.records) == (1, [])
    else:
        assert "not written" in caplog.records[-1].getMessage()
        assert kept == []


def test_pictures_that_were_encoded_otherwise_are_not_shared(text_prior):
    """How many pictures go through a VAE at once changes the last bits of latents."""
    for keys in ({"micro_batch": 3}, {"vae_slicing": True}):
        other = load_prior(PriorConfig(model="world:exact", device="cpu", **keys), require="text")
        assert other.made_by != text_prior.made_by


def test_what_it_does_not_know_is_named(prior, source, text_prior, tmp_path):
    full = lambda prompt, image: prior.predict({"full": Query(noise(1), 5, (prompt,), image)})  # noqa: E731
    with pytest.raises(InputError, match="'paint it beautiful'"):
        full("paint it beautiful", source.image[:1])
    with pytest.raises(InputError, match="no training view"):
        full(BRIGHT, source.image[:1] + 0.1)
    with pytest.raises(InputError, match="not 'a photo of my cat'"):
        text_prior.condition(["a photo of my cat"])
    with pytest.raises(InputError, match="not 'a red duck, front view, facing left'"):
        text_prior.condition(["a red duck, front view, facing left"])
    with pytest.raises(InputError, match="32x32 only"):
        text_prior.predict({"text": Query(torch.zeros(1, 4, 8, 8), 5, ("a red duck",))})
    with pytest.raises(InputError, match="32x32 only"):
        replace(source, side=64).image  # noqa: B018
    elsewhere = replace(source, capture=replace(source.capture, folder=tmp_path))
    with pytest.raises(InputError, match="knows only captures of the world"):
        elsewhere.image  # noqa: B018
    prior.views = None
    with pytest.raises(InputError, match="captures of the world only"):
        full(BRIGHT, source.image[:1])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": "wrld:exact"}, "prior.model: wrld:exact: unknown prior 'wrld'; did you mean world"),
        ({"lora": ["style"]}, "prior.lora: world:exact has no network"),
        ({"family": "sd1"}, "prior.family: world:exact has no network"),
        ({"compile": True}, "prior.compile: world:exact has no network"),
        ({"attention": "sliced"}, "prior.attention: world:exact has no network"),
        ({"embedding_cache": "there"}, "prior.embedding_cache: world:exact has no network"),
    ],
)
def test_keys_that_cannot_be_are_named(keys, said):
    with pytest.raises(InputError, match=said) as caught:
        load_prior(PriorConfig(**{"model": "world:exact"} | keys), require="edit")
    assert "\n" not in str(caught.value)


def broken_and_resumed(config, folder, monkeypatch, at):
    """A run stopped after its `at`-th prediction, then resumed; `metrics.json`."""
    stop, calls, predict = StopRequest(), [], ExactPrior.predict_noise

    def counted(self, *args):
        calls.append(1)
        stop.requested |= len(calls) == at
        return predict(self, *args)

    with monkeypatch.context() as patch:
        for job in (AssetJob, EditJob):
            patch.setattr(job, "save", lambda *_: None)  # pictures and videos are a second each
        with monkeypatch.context() as counting:
            counting.setattr(ExactPrior, "predict_noise", counted)
            jobs.start(config, [], folder, None, "cpu", stop=stop)
        assert not json.loads((folder / "metrics.json").read_text())["finished"]
        jobs.resume(folder, [], "cpu", stop=StopRequest())
    return json.loads((folder / "metrics.json").read_text())


def test_a_scene_is_edited_under_it_and_a_stopped_run_resumes(tiny_config, tmp_path, monkeypatch):
    config = tmp_path / "exact.yaml"
    text = (
        tiny_config.read_text().replace("compare: [in2n]", "compare: []").replace("video_frames: 3", "video_frames: 2")
    )
    model = text.partition("prior: {model: ")[2].partition("}")[0]
    config.write_text(text.replace(f"prior: {{model: {model}}}", "prior: {model: 'world:exact'}"))
    folder = jobs.start(config, [], tmp_path / "whole", None, "cpu", stop=StopRequest())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["prior"] == TITLE
    assert "model: world:exact\n" in (folder / "config.yaml").read_text()
    assert f"{TITLE} (world:exact)" in (folder / "report.html").read_text()
    assert f"{TITLE} (world:exact)" in (folder / "log.txt").read_text()
    resumed = broken_and_resumed(config, tmp_path / "broken", monkeypatch, at=3)
    assert resumed["finished"]
    assert resumed["results"]["csd_edit"]["psnr_truth"] == metrics["results"]["csd_edit"]["psnr_truth"]


def test_an_asset_is_made_under_it_and_a_stopped_run_resumes(tmp_path, monkeypatch):
    config = tmp_path / "asset.yaml"
    config.write_text(
        "task: text_to_3d\nprior: {model: 'world:exact'}" + CASES["text_to_3d"].replace("compare: [sds]", "")
    )
    metrics = broken_and_resumed(config, tmp_path / "run", monkeypatch, at=2)
    assert metrics["finished"]
    assert metrics["prior"] == TITLE


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["prior.model=wrld:exact"], "did you mean world"),
        (["prior.model=world:exact", "prompt=paint it beautiful"], "knows only the world's instructions"),
        (["prior.model=world:exact", "working_size=64"], "working_size: prior.model=world:exact has pictures of 32x32"),
    ],
)
def test_a_job_that_cannot_be_ends_in_one_line_before_any_work(tiny_config, tmp_path, capsys, keys, said):
    folder = tmp_path / "run"
    assert main(["--config", str(tiny_config), "--output", str(folder), "--device", "cpu", *keys]) == 2
    assert said in capsys.readouterr().err
    assert not folder.exists()
