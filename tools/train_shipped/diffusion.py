"""Shared by the shipped diffusion models: networks, noise schedule, noised latents, the folder that is written.

Symbols: z scaled latents [B,4,h,w], t timesteps [B], ᾱ alphas_cumprod [T], ε noise, v = √ᾱ ε − √(1−ᾱ) z velocity.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from csd3d.priors.camera_embedding import camera_map, no_camera
from tools.train_shipped.vae import save_whole

if TYPE_CHECKING:  # training does not need the pipelines and their imports
    from diffusers import DiffusionPipeline

HIGH, FROM = 0.6, 0.8  # see `high_share`; from this part of T on noise is high


class Denoiser(nn.Module):
    """UNet and text encoder in one module, so that one optimiser and one checkpoint hold both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy: Tensor, condition: Tensor | None, t: Tensor, tokens: Tensor, camera: Tensor | None = None
    ) -> Tensor:
        """`camera` [B,K] goes to the UNets that take one (`csd3d.priors.camera_embedding`), only."""
        y = self.text_encoder(tokens).last_hidden_state
        seen = noisy if condition is None else torch.cat([noisy, condition], 1)
        if camera is None and self.unet.class_embedding is not None:
            camera = no_camera(len(noisy), noisy.device)
        if self.unet.config.in_channels > seen.shape[1]:
            seen = torch.cat([seen, camera_map(camera, *seen.shape[2:]).to(seen)], 1)
        return self.unet(seen, t, y, class_labels=camera, return_dict=False)[0]


def load_denoiser(folder: Path) -> Denoiser:
    """Load the networks of a pipeline folder for further training."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return Denoiser(unet, CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32))


def for_training(denoiser: Denoiser) -> Denoiser:
    """Set up the networks for speed on a CPU, where fused attention has a slow backward pass; in place.

    Images a second on a Zen 4 core: 41 with diffusers' defaults, channels-last; 58 so. The text encoder: 574 to 900.
    """
    denoiser.unet.set_attn_processor(AttnProcessor())
    denoiser.text_encoder.set_attn_implementation("eager")
    return denoiser.eval()  # no layer has a train mode, but in it diffusers copies every shortcut's input


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's schedule, √β linear from √0.00085 to √0.012, T = 1000; v-prediction.

    At high noise v is −z, most of it the source to be copied. An ε-prediction's error is multiplied by up to 15 on its
    way to z there, which a network of this size shows as noise all over the background. Samplers start at t = 999, as
    arXiv 2305.08891 (section 3.3) finds they must: pure noise is what that level holds, and not quite what 950 does.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def velocity_weight(alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR + 1, γ + 1)/(SNR + 1), SNR = ᾱ/(1 − ᾱ); [T].

    min-SNR (Hang et al. 2023, arXiv 2303.09556) for v-prediction, but an error of z keeps weight 1 at high noise, where
    theirs falls to SNR: that is where an edit decides what to draw.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr + 1).clamp(max=gamma + 1) / (snr + 1)


@dataclass(frozen=True)
class Noised:
    """z_t = √ᾱ z + √(1−ᾱ) ε and its velocity [B,4,h,w], timesteps t [B], the loss's weights of them [B]."""

    z_t: Tensor
    velocity: Tensor
    t: Tensor
    weight: Tensor

    def error(self, predicted: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Mean square |v̂ − v|² of `rows` of the batch, [rows]; unweighted."""
        return (predicted.float() - self.velocity[rows]).square().mean((1, 2, 3))


def draw_noised(z: Tensor, alphas_cumprod: Tensor, generator: torch.Generator, high: float = 0.0) -> Noised:
    """Noise z at uniform t with normal ε; a share `high` of the batch has t of `FROM` T or more, where shapes form.

    Everything is drawn on the generator's device: one of the CPU draws the same wherever z is, one of a GPU's costs the
    host nothing.
    """
    steps, place = len(alphas_cumprod), generator.device
    alphas_cumprod = alphas_cumprod.to(place)
    t = torch.randint(steps, (len(z),), generator=generator, device=place)
    if high:
        raised = torch.rand(len(z), generator=generator, device=place) < high
        first = round(FROM * steps)
        t = torch.where(raised, first + t * (steps - first) // steps, t)
    noise = torch.randn(z.shape, generator=generator, device=place).to(z.device)
    a = alphas_cumprod[t][:, None, None, None].to(z.device)
    weight = velocity_weight(alphas_cumprod)[t].to(z.device)
    z_t, velocity = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
    return Noised(z_t, velocity, t.to(z.device), weight)


def high_share(progress: float) -> float:
    """Share of a batch at high noise, where shapes and sides form: `HIGH` until 60 % of the time, then falling to 0."""
    return HIGH * min(1.0, 2.5 * (1 - progress))


def blur(modes: Tensor) -> Tensor:
    """Latents [B,4,h,w] at half resolution, which decode to blurred pictures."""
    return F.interpolate(F.avg_pool2d(modes, 2), scale_factor=2, mode="bilinear")


def save_pipeline(
    kind: "type[DiffusionPipeline]",
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae_folder: Path,
    out: Path,
) -> None:
    """Write the diffusers folder that `kind.from_pretrained` loads, fp16 safetensors, replacing `out` whole.

    The VAE is read again each time, so that a decoder still in training elsewhere is picked up.
    """
    pipeline = kind(
        vae=AutoencoderKL.from_pretrained(vae_folder).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_whole(out, pipeline)
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
