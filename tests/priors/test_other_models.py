"""SDXL, DeepFloyd IF and Stable Diffusion 3 against diffusers' own pipelines on the same weights."""

import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from tiny_models import MAX_TOKENS, save_tiny_sd3, save_tiny_sdxl

from csd3d.priors import Condition, PriorConfig, edit_branches, load_prior
from csd3d.priors.flow import flow_time

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # as in test_diffusers_prior
LOOP = {"rtol": 1e-3, "atol": 1e-4}  # after a few steps
PROMPT, SCALE = "make it red", 5.0


def images(batch=2, height=32, width=48, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(folder, require="text"):
    return load_prior(PriorConfig(str(folder), device="cpu"), require)


def quiet_pipeline(kind, folder, **options):
    pipeline = kind.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided(prior, z, t):
    """Classifier-free guidance with the project's one convention."""
    null, text = (prior.predict_noise(z, t, prior.condition([prompt]).expand(len(z))) for prompt in ("", PROMPT))
    return null + SCALE * (text - null)


@pytest.fixture
def sdxl(sdxl_folder):
    return opened(sdxl_folder)


@pytest.fixture
def deepfloyd(if_folder):
    return opened(if_folder)


@pytest.fixture
def sd3(sd3_folder):
    return opened(sd3_folder)


@pytest.fixture(scope="module")
def sdxl_pipeline(sdxl_folder):
    return quiet_pipeline(StableDiffusionXLPipeline, sdxl_folder, add_watermarker=False)


@pytest.fixture(scope="module")
def if_pipeline(if_folder):
    return quiet_pipeline(IFPipeline, if_folder)


@pytest.fixture(scope="module")
def sd3_pipeline(sd3_folder):
    return quiet_pipeline(StableDiffusion3Pipeline, sd3_folder)


# --- SDXL ---


@pytest.mark.parametrize("zero_null", [True, False])
def test_sdxl_embeds_as_the_pipeline_for_text_and_for_nothing(tmp_path, zero_null):
    folder = save_tiny_sdxl(tmp_path / "sdxl", zero_null=zero_null)
    pipeline = quiet_pipeline(StableDiffusionXLPipeline, folder, add_watermarker=False)
    text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPT, device="cpu")
    condition = opened(folder).condition([PROMPT, ""])
    torch.testing.assert_close(condition.text, torch.cat([text, null]), **TOLERANCE)
    torch.testing.assert_close(condition.pooled, torch.cat([pooled, null_pooled]), **TOLERANCE)
    assert condition.text.shape == (2, MAX_TOKENS, 40)
    assert bool((condition.pooled[1] == 0).all()) == zero_null
    assert condition.pooled[0].abs().max() > 1e-3


def test_sdxl_retraces_the_pipelines_sampling(sdxl, sdxl_pipeline):
    """Text, pooled text, sizes and guidance together: our ε gives the pipeline's latents."""
    start = noise(1, 4, 4, 6)
    options = {"num_inference_steps": 3, "guidance_scale": SCALE, "output_type": "latent"}
    expected = sdxl_pipeline(PROMPT, latents=start, height=32, width=48, **options).images
    scheduler = DDIMScheduler.from_config(sdxl_pipeline.scheduler.config)
    scheduler.set_timesteps(3)
    z = start
    for t in scheduler.timesteps:
        z = scheduler.step(guided(sdxl, z, int(t)), t, z).prev_sample
    torch.testing.assert_close(z, expected, **LOOP)
    decoded = sdxl_pipeline(PROMPT, latents=start, height=32, width=48, **options | {"output_type": "pt"}).images
    torch.testing.assert_close(sdxl.decode(z), decoded, **LOOP)


def test_sdxl_sizes_and_pooled_text_count(sdxl):
    """Guards the comparison above: the UNet hears both, and a size left out is that of the whole picture."""
    z, condition = noise(1, 4, 4, 6), sdxl.condition([PROMPT])
    base = sdxl.predict_noise(z, 300, condition)

    def with_sizes(*sizes):
        return Condition(condition.text, pooled=condition.pooled, time_ids=torch.tensor([sizes]))

    assert torch.equal(sdxl.predict_noise(z, 300, with_sizes(32, 48, 0, 0, 32, 48)), base)
    assert (sdxl.predict_noise(z, 300, with_sizes(48, 32, 0, 0, 32, 48)) - base).abs().max() > 1e-4
    louder = Condition(condition.text, pooled=condition.pooled + 1)
    assert (sdxl.predict_noise(z, 300, louder) - base).abs().max() > 1e-4


def test_sdxl_edits_as_its_editing_pipeline(tmp_path):
    folder = save_tiny_sdxl(tmp_path / "edit", in_channels=8)
    prior = opened(folder, "edit")
    pipeline = quiet_pipeline(StableDiffusionXLInstructPix2PixPipeline, folder, add_watermarker=False)
    start = noise(1, 4, 4, 6)
    expected = pipeline(
        PROMPT,
        image=images(1),
        height=32,
        width=48,
        latents=start,
        num_inference_steps=2,
        guidance_scale=SCALE,
        image_guidance_scale=1.5,
        output_type="latent",
    ).images
    branches = edit_branches(prior.condition([PROMPT]), prior.condition([""]), prior.encode_condition(images(1)))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(2)
    z = start
    for t in scheduler.timesteps:
        null, image, full = (prior.predict_noise(z, int(t), branch) for branch in branches)
        z = scheduler.step(null + 1.5 * (image - null) + SCALE * (full - image), t, z).prev_sample
    torch.testing.assert_close(z, expected, **LOOP)


def test_a_condition_without_pooled_text_is_refused_in_words(sdxl, sd3):
    for prior, channels in ((sdxl, 4), (sd3, 16)):
        with pytest.raises(ValueError, match=r"prior\.condition"):
            prior.predict_noise(noise(1, channels, 4, 4), 5, Condition(prior.embed([PROMPT])))


# --- DeepFloyd IF ---


def test_if_embeds_as_the_pipeline(deepfloyd, if_pipeline):
    text, null = if_pipeline.encode_prompt("  Make it RED ", device="cpu")
    torch.testing.assert_close(deepfloyd.embed(["  Make it RED ", ""]), torch.cat([text, null]), **TOLERANCE)
    assert torch.equal(deepfloyd.embed(["make it red"]), deepfloyd.embed(["  Make it RED "]))
    assert deepfloyd.embed([PROMPT]).shape == (1, 77, 16)
    assert (text - null).abs().max() > 1e-2


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_if_retraces_the_pipelines_sampling(deepfloyd, if_pipeline, variance_type):
    """The mean of each DDPM step is ours whether or not the pipeline uses the variance that we leave off."""
    pipeline = IFPipeline(**if_pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler.from_config(if_pipeline.scheduler.config, variance_type=variance_type)
    generator, seen = torch.Generator().manual_seed(5), []
    steps = 3 if variance_type == "fixed_small" else 1  # one step to t = 0 adds no noise
    timesteps = None if steps == 3 else [0]
    pipeline(
        PROMPT,
        height=8,
        width=8,
        num_inference_steps=steps,
        timesteps=timesteps,
        guidance_scale=SCALE,
        generator=generator,
        clean_caption=False,
        output_type="pt",
        callback=lambda i, t, z: seen.append(z),
    )
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, 3, 8, 8, generator=generator)
    scheduler = DDPMScheduler.from_config(if_pipeline.scheduler.config, variance_type="fixed_small")
    scheduler.set_timesteps(steps) if timesteps is None else scheduler.set_timesteps(timesteps=timesteps)
    for t in scheduler.timesteps:
        z = scheduler.step(guided(deepfloyd, z, int(t)), t, z, generator=generator).prev_sample
    assert len(seen) == steps
    torch.testing.assert_close(z, seen[-1], **LOOP)


def test_if_leaves_the_learned_variance_off(deepfloyd):
    z, condition = noise(2, 3, 8, 8), deepfloyd.condition([PROMPT, ""])
    raw = deepfloyd.unet(z, torch.tensor([700, 700]), encoder_hidden_states=condition.text).sample
    assert raw.shape[1] == 6
    torch.testing.assert_close(deepfloyd.predict_noise(z, 700, condition), raw[:, :3], **TOLERANCE)


def test_if_pictures_are_resized_and_kept_in_range(deepfloyd):
    x = images(2, 32, 32)
    z = deepfloyd.encode(x)
    assert deepfloyd.latent_shape(32, 32) == tuple(z.shape[1:]) == (3, 8, 8)
    expected = F.interpolate(2 * x - 1, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2  # finer than z can hold: grey, without aliasing
    assert deepfloyd.encode(checks.expand(1, 3, 32, 32).float()).abs().max() < 0.1
    small = images(1, 8, 8)
    torch.testing.assert_close(deepfloyd.decode(deepfloyd.encode(small)), small, rtol=0, atol=1e-6)
    assert deepfloyd.decode(z, (32, 32)).shape == x.shape
    assert deepfloyd.decode(30 * z).min() == 0
    assert deepfloyd.decode(30 * z).max() == 1
    for size in ((32, 48), (33, 70), (20, 200)):  # the shorter side is 8, the longer nearly in proportion, both even
        channels, h, w = deepfloyd.latent_shape(*size)
        assert (channels, h) == (3, 8)
        assert w % 2 == 0
        assert abs(w - 8 * size[1] / size[0]) <= 1
        assert deepfloyd.encode(images(1, *size)).shape[1:] == (3, h, w)
        condition = deepfloyd.condition([PROMPT])
        assert deepfloyd.predict_noise(noise(1, 3, h, w), 9, condition).shape == (1, 3, h, w)


def test_if_encodes_and_decodes_with_a_gradient(deepfloyd):
    x = images(1, 16, 16).requires_grad_()
    z = deepfloyd.encode(x)
    deepfloyd.decode(z, (16, 16)).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(3.0 * 16 * 16), rtol=1e-5, atol=0)


def test_if_says_what_it_has_not(deepfloyd, sd3, sdxl):
    with pytest.raises(ValueError, match="LPIPS"):
        deepfloyd.features(images())
    for prior in (deepfloyd, sd3, sdxl):
        with pytest.raises(ValueError, match="InstructPix2Pix"):
            prior.encode_condition(images())


def test_if_reads_its_cosine_schedule(deepfloyd, if_pipeline):
    torch.testing.assert_close(deepfloyd.alphas_cumprod, if_pipeline.scheduler.alphas_cumprod)


# --- Stable Diffusion 3 ---


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_embeds_as_the_pipeline_with_and_without_t5(tmp_path, t5, caplog):
    folder = save_tiny_sd3(tmp_path / "sd3", t5=t5)
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = quiet_pipeline(StableDiffusion3Pipeline, folder, **absent)
    text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPT, None, None, device="cpu")
    with caplog.at_level(logging.WARNING, "csd3d"):
        condition = opened(folder).condition([PROMPT, ""])
    assert any("text_encoder_3" in record.getMessage() for record in caplog.records) == (not t5)
    torch.testing.assert_close(condition.text, torch.cat([text, null]), **TOLERANCE)
    torch.testing.assert_close(condition.pooled, torch.cat([pooled, null_pooled]), **TOLERANCE)
    assert condition.text.shape == (2, MAX_TOKENS + 256, 48)
    assert bool(condition.text[:, MAX_TOKENS:].any()) == t5


def test_sd3_retraces_the_pipelines_sampling(sd3, sd3_pipeline):
    """Our ε, turned back to a velocity, takes the pipeline's Euler steps; t = 899, 499, 199 are its times exactly."""
    start, steps = noise(1, 16, 4, 6), [0.9, 0.5, 0.2]
    options = {"sigmas": steps, "guidance_scale": SCALE, "height": 32, "width": 48, "latents": start}
    expected = sd3_pipeline(PROMPT, **options, output_type="latent").images
    x, s = start, [flow_time(sd3.alphas_cumprod[round(1000 * u) - 1]).item() for u in steps] + [0.0]
    assert s[:3] == pytest.approx([3 * u / (1 + 2 * u) for u in steps], rel=1e-4)
    for u, now, after in zip(steps, s, s[1:], strict=False):
        t = round(1000 * u) - 1
        alpha_bar = sd3.alphas_cumprod[t]
        z_t = x * (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
        velocity = (guided(sd3, z_t, t) - x) / (1 - now)
        x = x + (after - now) * velocity
    torch.testing.assert_close(x, expected, **LOOP)
    assert (x - start).abs().max() > 1e-2
    decoded = sd3_pipeline(PROMPT, **options, output_type="pt").images
    torch.testing.assert_close(sd3.decode(x), decoded, **LOOP)


def test_sd3_latents_are_shifted_then_scaled(sd3, sd3_pipeline):
    z = sd3.encode(images())
    mode = sd3_pipeline.vae.encode(images() * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(z, (mode - 0.0609) * 1.5305, **TOLERANCE)
    z = noise(1, 16, 4, 4)
    expected = sd3_pipeline.vae.decode(z / 1.5305 + 0.0609, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(sd3.decode(z), expected.clamp(0, 1).detach(), **TOLERANCE)
    assert len(sd3.features(images())) == 5


def test_sd3_pads_pictures_to_whole_patches(sd3):
    x = images(1, 33, 40)  # to 48 x 48: patches are 16 pixels
    z = sd3.encode(x)
    assert sd3.latent_shape(33, 40) == tuple(z.shape[1:]) == (16, 6, 6)
    assert sd3.predict_noise(z, 500, sd3.condition([PROMPT])).shape == z.shape
    assert sd3.decode(z, (33, 40)).shape == x.shape


def test_sd3_depends_on_each_of_its_inputs(sd3):
    z, condition = noise(1, 16, 4, 4), sd3.condition([PROMPT])
    base = sd3.predict_noise(z, 500, condition)
    for other in (
        sd3.predict_noise(z, 20, condition),
        sd3.predict_noise(z + 0.1, 500, condition),
        sd3.predict_noise(z, 500, Condition(condition.text + 1, pooled=condition.pooled)),
        sd3.predict_noise(z, 500, Condition(condition.text, pooled=condition.pooled + 1)),
    ):
        assert (other - base).abs().max() > 1e-4


# --- all of them ---


@pytest.mark.parametrize("name", ["sdxl", "deepfloyd", "sd3"])
def test_micro_batches_change_nothing(request, name):
    prior = request.getfixturevalue(name)
    z = noise(5, *prior.latent_shape(32, 32))
    t, condition = torch.tensor([999, 3, 20, 500, 333]), prior.condition(["red", "blue", "", "a", PROMPT])
    whole = prior.predict_noise(z, t, condition)
    prior.micro_batch = 2
    torch.testing.assert_close(prior.predict_noise(z, t, condition), whole, **TOLERANCE)
    alone = [prior.predict_noise(z[i : i + 1], int(t[i]), condition[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole, **TOLERANCE)
    assert prior.unet_evaluations == 15
    assert whole.isfinite().all()


def test_conditions_carry_their_extras():
    one = Condition(noise(1, 3, 2), pooled=noise(1, 5), time_ids=noise(1, 6))
    two = Condition(noise(2, 3, 2, seed=2), pooled=noise(2, 5, seed=3), time_ids=noise(2, 6, seed=4))
    joined = Condition.cat([one, two])
    assert torch.equal(joined[1:].pooled, two.pooled)
    assert torch.equal(joined[torch.tensor([0])].time_ids, one.time_ids)
    assert torch.equal(one.expand(4).pooled, one.pooled.repeat(4, 1))
    with pytest.raises(ValueError, match=r"1 of 2.*pooled"):
        Condition.cat([one, Condition(two.text, time_ids=two.time_ids)])
    with pytest.raises(ValueError, match="pooled"):
        Condition(one.text, pooled=two.pooled)
    with pytest.raises(ValueError, match="time_ids"):
        Condition(one.text, time_ids=noise(6))


@pytest.mark.parametrize("name", ["sdxl", "deepfloyd", "sd3"])
def test_a_long_prompt_warns_once_an_encoder_with_what_is_cut(request, name, caplog):
    prior = request.getfixturevalue(name)
    limits = {"sdxl": [MAX_TOKENS], "deepfloyd": [77], "sd3": [MAX_TOKENS, 256]}[name]
    prompt = "red " * 300 + "blue blue"
    with caplog.at_level(logging.WARNING, "csd3d"):
        prior.embed([prompt, prompt])
        prior.embed([prompt])
    messages = [record.getMessage() for record in caplog.records]
    assert [f"({limit} tokens)" in message for limit, message in zip(limits, messages, strict=True)] == [True] * len(
        limits
    )
    assert all("red blue blue'" in message for message in messages)
    if name == "deepfloyd":
        kept = " ".join(["red"] * 76)
        assert messages[0].endswith(f"cut off {' '.join(['red'] * 224 + ['blue', 'blue'])!r}")
        torch.testing.assert_close(prior.embed([prompt]), prior.embed([kept]))


def test_letters_out_of_t5s_vocabulary_warn(deepfloyd, caplog):
    with caplog.at_level(logging.WARNING, "csd3d"):
        deepfloyd.embed(["make it red"])
        assert not caplog.records
        deepfloyd.embed(["zebra"])
    assert "vocabulary" in caplog.records[0].getMessage()
