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
from family_checks import LOOP, PROMPT, SCALE, images, noise, opened, quiet_pipeline
from tiny_models import save_tiny_sdxl

from csd3d.distillation.method import Query
from csd3d.priors.flow import flow_time

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


def test_stable_diffusion_3(sd3_folder):
    pipeline, prior, x = quiet_pipeline(StableDiffusion3Pipeline, sd3_folder), opened(sd3_folder), noise(1, 16, 4, 6)
    expected = pipeline(
        PROMPT, sigmas=[0.5], guidance_scale=SCALE, **SIZE, latents=x, output_type="latent"
    ).images  # from s(0.5) to 0 at once
    alpha_bar = prior.alphas_cumprod[499]
    s = flow_time(alpha_bar).item()
    eps = guided(prior, x * (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()), 499)
    torch.testing.assert_close(x - s * (eps - x) / (1 - s), expected, **LOOP)
