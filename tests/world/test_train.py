"""Training of the shipped priors on a data set of coloured discs, small enough for seconds."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from discs import SIZE, write_discs
from safetensors.torch import load_file
from torch import nn

from csd3d.distillation.method import Query
from csd3d.errors import InputError
from csd3d.priors import PriorConfig, load_prior
from csd3d.world.scene import COLOURS
from tools.train_shipped import diffusion, ip2p, judge, stream, t2i, vae
from tools.train_shipped.__main__ import main
from tools.train_shipped.data import gather, open_pairs, random_crop, texts
from tools.train_shipped.loop import FitConfig, Trainer, fit, learning_rate
from tools.train_shipped.sheet import by_turns
from tools.train_shipped.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_discs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A work folder with a VAE and both pipelines after a few steps, through the command line."""
    work = tmp_path_factory.mktemp("work")
    pairs, small = ["--pairs", str(folder)], ["--precision", "fp32", "--threads", "1"]
    steps = ["--steps", "6", "--batch", "2"]
    rows = ["--capacity", "4", "--first-rows", "4", "--reuse", "1", "--held-out", "2"]
    assert main(["vae", *pairs, "--work", str(work / "v"), "--channels", "8,8,16,16", *steps, *small]) == 0
    assert main(["tokenizer", *pairs, "--work", str(work)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", 4)
        new = ["--vae", str(work / "v/vae"), "--tokenizer", str(work / "tokenizer"), "--channels", "32,32,64"]
        out = ["--out", str(work / "out"), *rows, *steps, *small]
        assert main(["ip2p", "--work", str(work / "i"), *new, *out]) == 0
        out = ["--init", str(work / "out"), "--out", str(work / "text"), *rows, *steps, *small]
        assert main(["t2i", "--work", str(work / "t"), *out]) == 0
    return work


def test_pairs_are_read_as_written(folder):
    pairs = open_pairs(folder)
    assert len(pairs) == 24
    assert pairs.size == SIZE
    target = pairs.records[5]["target_caption"].split()[1]
    inside = gather(pairs.target, torch.tensor([5]))[0][:, pairs.mask[5] > 0]
    torch.testing.assert_close(inside.mean(1), torch.tensor(COLOURS[target]), rtol=0, atol=1 / 255)
    assert texts(pairs)[0] == ""
    assert len(texts(pairs)) == len(set(texts(pairs)))


def test_a_short_file_is_refused(folder, tmp_path):
    copy = write_discs(tmp_path / "pairs", 3)
    (copy / "target.u8").write_bytes(b"0")
    with pytest.raises(InputError, match=r"target\.u8"):
        open_pairs(copy)
    with pytest.raises(InputError, match=r"meta\.json"):
        open_pairs(tmp_path / "nowhere")


def test_crops_share_their_window_and_keep_the_latent_grid():
    ramp = torch.arange(64.0).repeat(2, 3, 64, 1)
    corners = {random_crop(ramp, 32, torch.Generator().manual_seed(s))[0, 0, 0, 0].item() for s in range(40)}
    assert corners == {0, 8, 16, 24, 32}


def test_learning_rate_warms_up_holds_and_decays(tmp_path):
    wsd = FitConfig(tmp_path, steps=1000, lr=2.0, warmup=100)
    assert learning_rate(wsd, 49, 0.05) == pytest.approx(1.0)
    assert learning_rate(wsd, 690, 0.69) == 2.0
    assert learning_rate(wsd, 850, 0.85) == pytest.approx(1.0)
    assert learning_rate(wsd, 1000, 1.0) == pytest.approx(0.01)
    cosine = FitConfig(tmp_path, steps=1000, lr=2.0, warmup=100, schedule="cosine")
    assert learning_rate(cosine, 250, 0.25) == pytest.approx(1 + math.cos(math.pi / 4))


def quadratic(model):
    def loss_fn(generator, progress):
        x = torch.randn(8, 3, generator=generator)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return loss_fn


def run_linear(work, stop=None):
    """60 steps of a linear regression; with `stop`, saved and abandoned there, then continued by a fresh trainer."""
    config = FitConfig(work, steps=60, lr=0.05, warmup=5)
    for last in ([stop] if stop else []) + [60]:
        torch.manual_seed(3)
        model = nn.Linear(3, 1)
        trainer = Trainer(model, config)
        if last < 60:
            work.mkdir()
            for _ in range(last):
                trainer.update(quadratic(model))
            trainer.save()
            trainer.update(quadratic(model))  # lost by the kill
        else:
            fit(trainer, quadratic(model))
    return trainer


def test_a_killed_and_resumed_run_ends_like_an_unbroken_one(tmp_path):
    whole, broken = run_linear(tmp_path / "a"), run_linear(tmp_path / "b", stop=23)
    assert broken.step == whole.step == 60
    for name, value in whole.parameters.items():
        assert torch.equal(value, broken.parameters[name])
        assert torch.equal(whole.ema[name], broken.ema[name])
    torch.testing.assert_close(whole.parameters["weight"], torch.ones(1, 3), rtol=0, atol=0.1)
    assert not list((tmp_path / "a").glob("*.tmp"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_linear(tmp_path / "a")
    with pytest.raises(InputError, match="weight: the checkpoint belongs to a run with"):
        Trainer(nn.Linear(4, 1), FitConfig(tmp_path / "a", steps=60)).load()


def test_a_step_without_finite_gradient_changes_nothing(tmp_path):
    model = nn.Linear(3, 1)
    trainer = Trainer(model, FitConfig(tmp_path, steps=5))
    before = model.weight.detach().clone()
    assert trainer.update(lambda g, p: {"loss": model.weight.sum() * float("nan")}) == {}
    assert trainer.skipped == 1
    assert torch.equal(model.weight, before)


def test_ema_follows_its_recursion(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    trainer = Trainer(model, FitConfig(tmp_path, steps=50, ema=0.9, lr=0.1, warmup=1))
    expected = model.weight.item()
    for step in range(1, 20):
        trainer.update(quadratic_one(model))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
    assert trainer.ema["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert trainer.ema_model().weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() != pytest.approx(expected, rel=1e-5)


def quadratic_one(model):
    return lambda generator, progress: {"loss": (model.weight - 3).square().sum()}


def test_colour_error_costs_more_than_grey_error_of_the_same_size():
    x = torch.zeros(1, 3, 16, 16)
    grey = vae.reconstruction_loss(x + 0.1, x)
    hue = vae.reconstruction_loss(x + torch.tensor([0.1, -0.1, 0.1])[:, None, None], x)
    assert grey.item() == pytest.approx(0.1 + 4 * 0.01 + 0 + 2 * 0.1, rel=1e-5)
    assert hue > grey + 0.03
    checks = 0.1 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    assert vae.reconstruction_loss(x + checks, x).item() == pytest.approx(0.1 + 4 * 0.01, rel=1e-5)


def test_the_colour_anchor_is_zero_where_latents_are_colours():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    z[:, :3] = 2 * x.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5))
    assert vae.colour_anchor(z, x).item() < 1e-12
    assert vae.colour_anchor(z + 1, x).item() == pytest.approx(1, rel=1e-5)
    assert [vae.anchor_weight(p) for p in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([1, 0.5, 0.02, 0.02])


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(folder, trained, tmp_path):
    pairs, before = open_pairs(folder), AutoencoderKL.from_pretrained(trained / "v/vae")
    options = ["--pairs", str(folder), "--work", str(tmp_path / "w"), "--init", str(trained / "v/vae")]
    assert main(["vae", *options, "--freeze-encoder", "--steps", "3", "--batch", "2", "--precision", "fp32"]) == 0
    after = AutoencoderKL.from_pretrained(tmp_path / "w/vae")
    assert vae.fingerprint(before) == vae.fingerprint(after)
    assert before.config.scaling_factor == after.config.scaling_factor
    z = before.encode(gather(pairs.source, torch.arange(2))).latent_dist.mean
    assert not torch.equal(before.decode(z).sample, after.decode(z).sample)


def test_scaling_factor_gives_the_latents_unit_spread(folder, trained):
    pairs, model = open_pairs(folder), AutoencoderKL.from_pretrained(trained / "v/vae")
    with torch.no_grad():
        modes = model.encode(2 * gather(pairs.target, torch.arange(len(pairs))) - 1).latent_dist.mean
    assert (modes * model.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)


def test_tokenizer_round_trips_known_and_unknown_words(tmp_path):
    tokenizer = build_tokenizer(["make it red", "make the snowman red", "a snowman with stripes"] * 3)
    ip2p.save_tokenizer(tokenizer, tmp_path / "t")
    loaded = type(tokenizer).from_pretrained(tmp_path / "t")
    assert loaded.model_max_length == 32
    assert loaded.tokenize("make the snowman red") == ["make</w>", "the</w>", "snowman</w>", "red</w>"]
    ids = loaded("Naïve  ζebra 7!").input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "naïve ζebra 7 !"
    assert ids[0] == loaded.bos_token_id == len(loaded) - 2
    assert ids[-1] == loaded.eos_token_id == len(loaded) - 1
    assert loaded("red", padding="max_length").input_ids == tokenizer("red", padding="max_length").input_ids


def test_the_weight_of_the_clean_image_error_is_bounded_on_both_sides():
    a = torch.tensor([0.99, 0.9, 0.5, 0.01])
    # |v̂ − v|² = (SNR + 1) |ẑ − z|², since ẑ = √ᾱ z_t − √(1−ᾱ) v̂
    weight, snr = diffusion.velocity_weight(a), a / (1 - a)
    torch.testing.assert_close(weight * (snr + 1), torch.tensor([6.0, 6.0, 2.0, 1 + 0.01 / 0.99]))


def test_fast_attention_computes_what_the_exported_unet_does():
    tokenizer = build_tokenizer(["make it red"])
    denoiser = ip2p.build_denoiser(tokenizer, (32, 32, 64), 4, 0.5).eval()
    g = torch.Generator().manual_seed(0)
    arguments = torch.randn(3, 4, 4, 4, generator=g), torch.randn(3, 4, 4, 4, generator=g), torch.tensor([1, 500, 999])
    tokens = torch.randint(len(tokenizer), (3, 32), generator=g)
    with torch.no_grad():
        before = denoiser(*arguments, tokens)
        after = diffusion.for_training(denoiser)(*arguments, tokens)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-5)


def test_the_exported_folder_is_an_ordinary_pipeline(trained):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(trained / "out", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("make it red", image=torch.rand(1, 3, SIZE, SIZE), num_inference_steps=2, generator=generator)
    assert image.images[0].size == (SIZE, SIZE)
    assert (trained / "out/tokenizer/vocab.json").exists()
    stored = load_file(trained / "out/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_the_text_model_is_a_diffusers_folder_on_the_editing_models_parts_and_knows_the_camera(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "text", dtype=torch.float32)
    assert pipeline.unet.config.class_embed_type == "projection"
    prior = load_prior(PriorConfig(model=str(trained / "text"), device="cpu"), require="text")
    assert prior.takes_camera
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    views = [torch.tensor([[azimuth, 15.0, 4.0]]) for azimuth in (0.0, 90.0)]
    eps = prior.predict({str(i): Query(z, 500, ("a red disc",), view=view) for i, view in enumerate(views)})
    assert not torch.equal(eps["0"], eps["1"])
    for part, learns in (("vae/diffusion_pytorch_model", False), ("text_encoder/model", True)):
        ours, theirs = (load_file(trained / folder / f"{part}.safetensors") for folder in ("text", "out"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) != learns


def test_the_text_unet_starts_as_the_editing_unet_without_a_picture():
    tokenizer = build_tokenizer(["make it red"])
    edit = ip2p.build_denoiser(tokenizer, (32, 32, 64), 4, 0.5).unet.eval()
    g = torch.Generator().manual_seed(0)
    z, t, y = torch.randn(3, 4, 4, 4, generator=g), torch.tensor([1, 500, 999]), torch.randn(3, 32, 128, generator=g)
    with torch.no_grad():
        alone = t2i.text_unet(edit).eval()(z, t, y).sample
        assert t2i.text_unet(text := t2i.text_unet(edit)) is text
        torch.testing.assert_close(alone, edit(torch.cat([z, torch.zeros_like(z)], 1), t, y).sample)


def test_noise_is_drawn_high_at_its_rate_and_undone_by_the_velocity():
    a = diffusion.noise_schedule().alphas_cumprod
    z = torch.randn(8000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for high, share in ((0.0, 0.2), (0.6, 0.68)):
        noised = diffusion.draw_noised(z, a, torch.Generator().manual_seed(1), high)
        assert (noised.t >= 800).float().mean().item() == pytest.approx(share, abs=0.02)
        assert 0 <= noised.t.min() < 5
        assert 995 <= noised.t.max() < 1000
        alpha = a[noised.t][:, None, None, None]
        torch.testing.assert_close(alpha.sqrt() * noised.z_t - (1 - alpha).sqrt() * noised.velocity, z)
    rows = torch.tensor([3, 5])
    torch.testing.assert_close(noised.error(noised.velocity[rows] + 0.5, rows), torch.tensor([0.25, 0.25]))


def test_nearest_colours_are_the_masked_means():
    names = list(COLOURS)
    images = torch.tensor([COLOURS[name] for name in names])[:, :, None, None].repeat(1, 1, 4, 4)
    masks = torch.zeros(len(names), 1, 4, 4, dtype=torch.bool)
    masks[:, :, :2] = True
    images[:, :, 2:] = 0.3  # outside the mask, must not count
    found, index = judge.nearest_colours(0.95 * images, masks)
    assert found == names
    assert torch.equal(index, torch.arange(len(names)))


def test_edits_are_judged_against_the_truth(folder):
    pairs, indices = open_pairs(folder), list(range(10))
    truth = gather(pairs.target, torch.arange(10))
    source = gather(pairs.source, torch.arange(10))
    shares = torch.tensor([0.2] * 7 + [-0.2] * 3)[:, None, None, None]  # towards the truth, away from it
    report = judge.judge_edits(pairs, indices, source + shares * (truth - source))
    assert report["all"]["closer_than_source"] == pytest.approx(0.7)
    before, gain = report["all"]["source_psnr"], -20 * (0.7 * math.log10(0.8) + 0.3 * math.log10(1.2))
    assert report["all"]["psnr"] == pytest.approx(before + gain, abs=1e-3)
    assert before == pytest.approx((-10 * (source - truth).square().mean((1, 2, 3)).log10()).mean().item(), abs=1e-4)
    assert report["ambiguous"] == {"pairs": 0, "psnr": None, "source_psnr": None, "closer_than_source": None}
    assert sum(row["pairs"] for row in report["families"].values()) == 10


def test_any_valid_answer_counts(folder, tmp_path):
    copy = write_discs(tmp_path / "pairs", 3)
    answers = np.stack([np.full((SIZE, SIZE, 3), v, np.uint8) for v in (0, 51, 204)])
    answers.tofile(copy / "answers.u8")
    lines = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    lines[1] |= {"answers": [1, 2], "ambiguous": True}
    (copy / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = open_pairs(copy)
    image = torch.full((3, SIZE, SIZE), 0.9)
    assert judge.best_psnr(pairs, 1, image) == pytest.approx(20, abs=1e-3)  # 204/255 is 0.1 away
    assert judge.best_psnr(pairs, 1, image * 0) == pytest.approx(-20 * math.log10(0.2), abs=1e-3)  # answer 0 is not its


def test_judge_writes_its_report_and_sheet(folder, trained, tmp_path):
    files = [
        "--json",
        str(tmp_path / "j.json"),
        "--sheet",
        str(tmp_path / "s.png"),
        "--log",
        str(trained / "i/log.jsonl"),
    ]
    options = ["--count", "6", "--steps", "2", "--text-scale", "1", "--image-scale", "1"]
    assert main(["judge", "--pairs", str(folder), "--model", str(trained / "out"), *files, *options]) == 0
    report = json.loads((tmp_path / "j.json").read_text())
    assert report["edits"]["unambiguous"]["pairs"] == 6
    assert set(report["edits"]["families"]) == {"paint", "recolour"}
    assert report["curves"]
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_families_take_turns_on_the_sheet():
    assert by_turns([("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("c", 6)]) == [1, 4, 5, 2, 6, 3]


def test_mistakes_end_in_one_line_and_code_2(folder, tmp_path, capsys):
    options = ["--pairs", str(folder), "--work", str(tmp_path)]
    assert main(["vae", *options]) == 2
    assert main(["vae", *options, "--steps", "1", "--freeze-encoder"]) == 2
    assert main(["vae", "--pairs", str(tmp_path), "--work", str(tmp_path), "--steps", "1"]) == 2
    rows = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--steps", "1"]
    assert main(["t2i", *rows, "--init", str(tmp_path)]) == 2
    assert main(["t2i", *rows, "--capacity", "100", "--first-rows", "101"]) == 2
    assert main(["t2i", *rows, "--reuse", "0"]) == 2
    assert main(["ip2p", *rows, "--vae", str(tmp_path)]) == 2
    assert main(["judge-rows", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 8
    assert not (tmp_path / "w").exists()


def test_training_goes_on_from_a_pipeline(trained, tmp_path, monkeypatch, capsys):
    """With --init the first step starts at the pipeline's own weights, words and all."""
    monkeypatch.setattr(stream, "CHUNK", 2)
    loaded = diffusion.load_denoiser(trained / "out")
    stored = load_file(trained / "out/unet/diffusion_pytorch_model.safetensors")
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value, stored[name].float())
    options = ["--init", str(trained / "out"), "--first-rows", "2", "--held-out", "1"]
    budget = ["--steps", "1", "--batch", "2", "--lr", "1e-9", "--precision", "fp32", "--threads", "1"]
    assert main(["ip2p", *options, "--work", str(tmp_path / "i"), "--out", str(tmp_path / "out"), *budget]) == 0
    assert "no held-out figures" in capsys.readouterr().out  # its words are not the shipped model's
    again = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    for name, value in stored.items():
        torch.testing.assert_close(again[name].float(), value.float(), rtol=2e-3, atol=1e-5)
    vocabularies = [(path / "out/tokenizer/vocab.json").read_text() for path in (trained, tmp_path)]
    assert vocabularies[0] == vocabularies[1]
