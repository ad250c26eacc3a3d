"""Stable Diffusion XL against diffusers' own pipelines on the same weights."""

import pytest
import torch
from asking import edit_branches
from diffusers import DDIMScheduler, StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPipeline
from family_checks import LOOP, PROMPT, SCALE, TOLERANCE, guided, images, noise, opened, quiet_pipeline
from tiny_models import MAX_TOKENS, save_tiny_sdxl

from csd3d.priors import Condition


@pytest.fixture
def sdxl(sdxl_folder):
    return opened(sdxl_folder)


@pytest.fixture(scope="module")
def sdxl_pipeline(sdxl_folder):
    return quiet_pipeline(StableDiffusionXLPipeline, sdxl_folder, add_watermarker=False)


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
