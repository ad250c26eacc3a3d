"""DeepFloyd IF's first stage against diffusers' own pipeline on the same weights."""

import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, IFPipeline
from family_checks import LOOP, PROMPT, SCALE, TOLERANCE, guided, images, noise, opened, quiet_pipeline


@pytest.fixture
def deepfloyd(if_folder):
    return opened(if_folder)


@pytest.fixture(scope="module")
def if_pipeline(if_folder):
    return quiet_pipeline(IFPipeline, if_folder)


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


def test_if_says_what_it_has_not(deepfloyd):
    with pytest.raises(ValueError, match="LPIPS"):
        deepfloyd.features(images())


def test_if_reads_its_cosine_schedule(deepfloyd, if_pipeline):
    torch.testing.assert_close(deepfloyd.alphas_cumprod, if_pipeline.scheduler.alphas_cumprod)


def test_letters_out_of_t5s_vocabulary_warn(deepfloyd, caplog):
    with caplog.at_level(logging.WARNING, "csd3d"):
        deepfloyd.embed(["make it red"])
        assert not caplog.records
        deepfloyd.embed(["zebra"])
    assert "vocabulary" in caplog.records[0].getMessage()
