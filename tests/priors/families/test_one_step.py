"""`predict` and one step of the scheduler give what diffusers' own pipeline makes in one step, for every family."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    IFPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from family_checks import LOOP, PROMPT, SCALE, flow_step, images, noise, opened, quiet_pipeline
from tiny_models import save_tiny_sd3, save_tiny_sdxl

from csd3d.distillation.method import Query
from csd3d.priors.flow import flow_input

SIZE = {"height": 32, "width": 48}


def answers(prior, z_t, t, image=None):
    asked = {"null": Query(z_t, t, ("",)), "full": Query(z_t, t, (PROMPT,), image)}
    if image is not None:
        asked["image"] = Query(z_t, t, ("",), image)
    return prior.predict(asked)


def guided(prior, z_t, t, image=None):
    eps = answers(prior, z_t, t, image)
    if image is None:
        return eps["null"] + SCALE * (eps["full"] - eps["null"])
    return eps["null"] + 1.5 * (eps["image"] - eps["null"]) + SCALE * (eps["full"] - eps["image"])


def ddim_step(prior, pipeline, z, image=None):
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    return scheduler.step(guided(prior, z, int(t), image), t, z).prev_sample


@pytest.mark.parametrize(
    ("kind", "fixture"), [(StableDiffusionPipeline, "text_folder"), (StableDiffusionXLPipeline, "sdxl_folder")]
)
def test_models_of_texts(request, kind, fixture):
    folder = request.getfixturevalue(fixture)
    pipeline, z = quiet_pipeline(kind, folder), noise(1, 4, 4, 6)
    options = {"num_inference_steps": 1, "guidance_scale": SCALE, "output_type": "latent"}
    expected = pipeline(PROMPT, latents=z, **SIZE, **options).images
    torch.testing.assert_close(ddim_step(opened(folder), pipeline, z), expected, **LOOP)


@pytest.mark.parametrize("kind", [StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline])
def test_editing_models(kind, edit_folder, tmp_path):
    xl = kind is StableDiffusionXLInstructPix2PixPipeline
    folder = save_tiny_sdxl(tmp_path / "edit", in_channels=8) if xl else edit_folder
    pipeline, prior, z = quiet_pipeline(kind, folder), opened(folder, "edit"), noise(1, 4, 4, 6)
    options = {"guidance_scale": SCALE, "image_guidance_scale": 1.5, "output_type": "latent"} | (SIZE if xl else {})
    expected = pipeline(PROMPT, image=images(1), latents=z, num_inference_steps=1, **options).images
    ours = ddim_step(prior, pipeline, z, prior.encode_condition(images(1)))
    torch.testing.assert_close(ours, expected, **LOOP)


def test_deepfloyd(if_folder):
    pipeline, seen = quiet_pipeline(IFPipeline, if_folder), []
    pipeline(  # a single step, to t = 0, adds no noise
        PROMPT,
        height=8,
        width=8,
        timesteps=[0],
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(5),
        clean_caption=False,
        output_type="pt",
        callback=lambda i, t, z: seen.append(z),
    )
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="fixed_small")
    scheduler.set_timesteps(timesteps=[0])
    ours = scheduler.step(guided(opened(if_folder), z, 0), 0, z).prev_sample
    torch.testing.assert_close(ours, seen[0], **LOOP)


@pytest.mark.parametrize("newer", [False, True])
def test_stable_diffusion_3_and_3_5(sd3_folder, tmp_path, newer):
    folder = save_tiny_sd3(tmp_path / "3.5", qk_norm="rms_norm", dual_attention_layers=(0,)) if newer else sd3_folder
    pipeline, prior, x = quiet_pipeline(StableDiffusion3Pipeline, folder), opened(folder), noise(1, 16, 4, 6)
    expected = pipeline(
        PROMPT, sigmas=[0.5], guidance_scale=SCALE, **SIZE, latents=x, output_type="latent"
    ).images  # from s(0.5) to 0 at once
    torch.testing.assert_close(flow_step(prior, lambda z_t: guided(prior, z_t, 499), x, 499), expected, **LOOP)


@pytest.mark.parametrize("masked", [False, True])
def test_ultraedit(tmp_path, masked):
    """Its pipeline is not in diffusers; this is what the authors' one gives the transformer."""
    folder = save_tiny_sd3(tmp_path / "model", in_channels=48 if masked else 32)
    prior, z_t, picture = opened(folder, "edit"), noise(1, 16, 4, 6), images(1)
    vae = prior.vae
    image, white = (vae.encode(2 * x - 1).latent_dist.mode() for x in (picture, torch.ones_like(picture)))
    torch.testing.assert_close(prior.encode(picture), image * vae.config.scaling_factor)  # without a shift
    condition = torch.cat([image, white], 1) if masked else image
    torch.testing.assert_close(prior.encode_condition(picture), condition, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.condition_from_latent(prior.encode(picture)), condition, rtol=1e-4, atol=1e-5)
    alpha_bar = prior.alphas_cumprod[499]
    x_s, s = flow_input(z_t, alpha_bar[None])
    for name, part in (("null", torch.zeros_like(condition)), ("image", condition), ("full", condition)):
        text = prior.condition([PROMPT if name == "full" else ""], condition)
        velocity = prior.unet(torch.cat([x_s, part], 1), text.text, text.pooled, 1000 * s).sample
        ours = answers(prior, z_t, 499, condition)[name]
        torch.testing.assert_close(ours, x_s + (1 - s) * velocity, rtol=1e-4, atol=1e-5)
