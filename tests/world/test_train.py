"""Training of the shipped priors on a data set of coloured discs, small enough for seconds."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from discs import SIZE, write_discs
from safetensors.torch import load_file
from torch import nn

from csd3d.errors import InputError
from csd3d.metrics.clip import VIEWS
from csd3d.world.scene import COLOURS
from tools.train_shipped import diffusion, ip2p, judge, t2i, vae
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
    """A work folder with a VAE and a pipeline after a few steps, through the command line."""
    work = tmp_path_factory.mktemp("work")
    pairs, small = ["--pairs", str(folder)], ["--precision", "fp32", "--threads", "1"]
    steps = ["--steps", "6", "--batch", "2"]
    assert main(["vae", *pairs, "--work", str(work / "v"), "--channels", "8,8,16,16", *steps, *small]) == 0
    ip2p_options = ["--vae", str(work / "v/vae"), "--out", str(work / "out"), "--channels", "32,32,64"]
    assert main(["ip2p", *pairs, "--work", str(work / "i"), *ip2p_options, *steps, *small]) == 0
    t2i_options = ["--base", str(work / "out"), "--out", str(work / "text")]
    assert main(["t2i", *pairs, "--work", str(work / "t"), *t2i_options, *steps, *small]) == 0
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
    assert diffusion.fingerprint(before) == diffusion.fingerprint(after)
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


def test_drops_have_their_rates():
    text, image = ip2p.drop_masks(200_000, torch.Generator().manual_seed(0))
    for rate in (text & ~image, image & ~text, text & image):
        assert rate.float().mean().item() == pytest.approx(0.05, abs=0.003)


def test_batches_carry_what_they_claim():
    count = 50
    modes = torch.arange(1.0, count + 1)[:, None, None, None].expand(count, 4, 2, 2)
    tokens = torch.arange(2 * count + 1)[:, None].expand(-1, 4)
    rows = torch.arange(1, count + 1)
    examples = ip2p.Examples(modes, modes + 1000, tokens, rows, rows + count)
    target, source, words = ip2p.draw_batch(examples, 20_000, torch.Generator().manual_seed(0))
    index, word = target[:, 0, 0, 0] - 1000, words[:, 0].float()
    dropped = source[:, 0, 0, 0] == 0
    assert torch.equal(source[~dropped][:, 0, 0, 0], index[~dropped])
    instructed, captioned = word == index, word == index + count
    assert torch.all(instructed | captioned | (word == 0))
    assert (word == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert captioned.float().mean().item() == pytest.approx(0.09, abs=0.01)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)


class Oracle(nn.Module):
    """Returns the velocity that a known z must have been mixed with."""

    def __init__(self, z, alphas_cumprod):
        super().__init__()
        self.z, self.a = z, alphas_cumprod

    def forward(self, noisy, condition, t, tokens):
        a = self.a[t][:, None, None, None]
        noise = (noisy - a.sqrt() * self.z) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * self.z


def test_the_loss_of_the_true_velocity_is_zero():
    a = diffusion.noise_schedule().alphas_cumprod
    z = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = (z, torch.zeros_like(z), torch.zeros(6, 4, dtype=torch.long))
    assert ip2p.ip2p_loss(Oracle(z, a), batch, a, torch.Generator().manual_seed(0)).item() < 1e-8
    assert ip2p.ip2p_loss(Oracle(z + 1, a), batch, a, torch.Generator().manual_seed(0)).item() > 0.01


def test_the_cached_latents_are_the_unscaled_modes(folder, trained):
    pairs, model = open_pairs(folder), AutoencoderKL.from_pretrained(trained / "v/vae")
    path = trained / f"i/latents-{diffusion.fingerprint(model)}-source.f16"
    cached = torch.from_numpy(np.fromfile(path, np.float16)).view(-1, 4, SIZE // 8, SIZE // 8)
    with torch.no_grad():
        modes = model.encode(2 * gather(pairs.source, torch.arange(len(pairs))) - 1).latent_dist.mode()
    torch.testing.assert_close(cached.float(), modes, rtol=2e-3, atol=2e-3)


def test_a_torn_latent_cache_is_completed(folder, trained, tmp_path):
    pairs, model = open_pairs(folder), AutoencoderKL.from_pretrained(trained / "v/vae")
    config = FitConfig(tmp_path, steps=1, precision="fp32")
    with torch.no_grad():
        whole = diffusion.cache_modes(model, pairs.source, tmp_path / "a", config)
        (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[: 7 * 128 + 31])
        again = diffusion.cache_modes(model, pairs.source, tmp_path / "b", config)
        read = diffusion.cache_modes(model, pairs.source, tmp_path / "b", config)
    torch.testing.assert_close(whole, again, rtol=0, atol=2e-3)
    assert torch.equal(again, read)
    assert len(again) == len(pairs)


def test_fast_attention_computes_what_the_exported_unet_does():
    tokenizer = build_tokenizer(["make it red"])
    denoiser = ip2p.build_denoiser(tokenizer, (32, 32, 64), 4, 0.5).eval()
    g = torch.Generator().manual_seed(0)
    arguments = torch.randn(3, 4, 4, 4, generator=g), torch.randn(3, 4, 4, 4, generator=g), torch.tensor([1, 500, 999])
    tokens = torch.randint(len(tokenizer), (3, 32), generator=g)
    with torch.no_grad():
        before = denoiser(*arguments, tokens)
        after = ip2p.for_training(denoiser)(*arguments, tokens)
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


def test_the_text_model_is_an_ordinary_pipeline_on_the_editing_models_parts(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "text", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a red disc", height=SIZE, width=SIZE, num_inference_steps=2, generator=generator).images
    assert images[0].size == (SIZE, SIZE)
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
        torch.testing.assert_close(alone, edit(torch.cat([z, torch.zeros_like(z)], 1), t, y).sample)


def test_captions_belong_to_their_pictures_and_are_loosened_and_dropped_at_their_rates():
    count = 50
    modes = torch.arange(1.0, count + 1)[:, None, None, None].expand(count, 4, 2, 2)
    tokens = torch.arange(1, count + 1)[:, None, None].expand(count, 2, 4)
    none = torch.zeros(count, dtype=torch.long)
    data = t2i.Captioned(modes, tokens, -tokens, 1000 + tokens, none, none[:4])
    drawn, words = t2i.draw_captioned(data, 20_000, torch.Generator().manual_seed(0))
    words = words[:, 1]
    dropped, loose, blurry = words[:, 0] == 0, words[:, 0] < 0, words[:, 0] > 1000
    own = words[:, 0].abs().float() - 1000 * blurry
    torch.testing.assert_close(own[~dropped], drawn.amax((1, 2, 3))[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert loose.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert blurry.float().mean().item() == pytest.approx(0.05, abs=0.01)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(2, 2)
    data = t2i.Captioned(checks.expand(count, 4, 4, 4), tokens, -tokens, 1000 + tokens, none, tokens[0, 0])
    drawn, words = t2i.draw_captioned(data, 2000, torch.Generator().manual_seed(0))
    words = words[:, 0]
    assert torch.equal((drawn == 0).all(-1).all(-1).all(-1), words[:, 0] > 1000)  # exactly what says so is blurred


def test_sides_lean_to_where_they_face_while_that_is_asked():
    facing = torch.tensor([-1, 1, 0, 0, 0, 0])
    modes = torch.arange(8.0).expand(6, 4, 8, 8)
    tokens = torch.arange(6)[:, None, None].expand(6, 2, 4)
    data = t2i.Captioned(modes, tokens, tokens, tokens, facing, tokens[0, 0])
    for leaning in (0, 3):
        drawn, words = t2i.draw_captioned(
            data, 4000, torch.Generator().manual_seed(0), 0.0, blurry=0.0, leaning=leaning
        )
        own = words[:, 0, 0]
        assert (own < 2).float().mean().item() == pytest.approx(2 / 3 if leaning else 1 / 3, abs=0.03)
        columns = drawn[:, 0, 0]
        assert torch.equal(columns[own == 0][0], (torch.arange(8.0) + leaning).clamp(max=7))  # its left half is gone
        assert torch.equal(columns[own == 1][0], (torch.arange(8.0) - leaning).clamp(min=0))
        assert torch.equal(columns[own > 1][0], torch.arange(8.0))


def test_noise_is_drawn_high_at_its_rate_and_undone_by_the_velocity():
    a = diffusion.noise_schedule().alphas_cumprod
    z = torch.randn(8000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for high, share in ((0.0, 0.5), (0.6, 0.8)):
        noised = diffusion.draw_noised(z, a, torch.Generator().manual_seed(1), high)
        assert (noised.t >= 500).float().mean().item() == pytest.approx(share, abs=0.02)
        assert 0 <= noised.t.min() < 5
        assert 995 <= noised.t.max() < 1000
        alpha = a[noised.t][:, None, None, None]
        torch.testing.assert_close(alpha.sqrt() * noised.z_t - (1 - alpha).sqrt() * noised.velocity, z)
    rows = torch.tensor([3, 5])
    torch.testing.assert_close(noised.error(noised.velocity[rows] + 0.5, rows), torch.tensor([0.25, 0.25]))


def test_another_view_takes_the_place_of_the_right_one_and_nothing_else_changes():
    rng = random.Random(0)
    assert t2i.other_view("a red ball, side view", rng) == "a red ball, side view"
    for view in VIEWS:
        found = Counter(t2i.other_view(f"a red duck, {view}", rng).removeprefix("a red duck, ") for _ in range(3000))
        assert found.keys() == set(VIEWS) - {view}
        words = {"front": "back", "back": "front", "left": "right", "right": "left"}
        opposite = next(view.replace(own, other) for own, other in words.items() if own in view)
        expected = {other: 0.8 if other == opposite else 0.1 for other in found}
        assert {other: count / 3000 for other, count in found.items()} == pytest.approx(expected, abs=0.04)


def test_the_view_loss_prefers_the_right_word_and_is_nothing_where_none_was_asked():
    right, other = torch.tensor([0.2, 0.3], requires_grad=True), torch.tensor([0.2, 0.3], requires_grad=True)
    loss = t2i.view_loss(right, other)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(right.grad, torch.full((2,), t2i.VIEW_STEEPNESS / 4))
    torch.testing.assert_close(other.grad, -right.grad)
    assert t2i.view_loss(right[:0], other[:0]).item() == 0


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
    assert capsys.readouterr().err.count("\n") == 3


def test_training_goes_on_from_a_pipeline(folder, trained, tmp_path):
    """With --init the first step starts at the pipeline's own weights, words and all."""
    loaded = ip2p.load_denoiser(trained / "out")
    stored = load_file(trained / "out/unet/diffusion_pytorch_model.safetensors")
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value, stored[name].float())
    options = ["--pairs", str(folder), "--vae", str(trained / "v/vae"), "--init", str(trained / "out")]
    budget = ["--steps", "1", "--batch", "2", "--lr", "1e-9", "--precision", "fp32", "--threads", "1"]
    assert main(["ip2p", *options, "--work", str(tmp_path / "i"), "--out", str(tmp_path / "out"), *budget]) == 0
    again = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    for name, value in stored.items():
        torch.testing.assert_close(again[name].float(), value.float(), rtol=2e-3, atol=1e-5)
    vocabularies = [(path / "out/tokenizer/vocab.json").read_text() for path in (trained, tmp_path)]
    assert vocabularies[0] == vocabularies[1]
