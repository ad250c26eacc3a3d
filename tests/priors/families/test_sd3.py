"""Stable Diffusion 3 against diffusers' own pipeline on the same weights."""

import logging

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from family_checks import LOOP, PROMPT, SCALE, TOLERANCE, guided, images, noise, opened, quiet_pipeline
from tiny_models import MAX_TOKENS, save_tiny_sd3

from csd3d.priors import Condition
from csd3d.priors.flow import flow_time


@pytest.fixture
def sd3(sd3_folder):
    return opened(sd3_folder)


@pytest.fixture(scope="module")
def sd3_pipeline(sd3_folder):
    return quiet_pipeline(StableDiffusion3Pipeline, sd3_folder)


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
