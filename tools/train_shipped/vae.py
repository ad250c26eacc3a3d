"""Training of the shipped AutoencoderKL: 128² pixels to 4×16×16 latents, evaluated by colours and PSNR.

Symbols: x images [B,3,S,S] in [-1, 1], x̂ reconstructions, d = x̂ − x, z latents [B,4,S/8,S/8].
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tools.train_shipped.data import Pairs, gather, random_crop
from tools.train_shipped.loop import FitConfig, Trainer, autocast, fit


def build_vae(channels: tuple[int, ...] = (16, 32, 64, 96)) -> AutoencoderKL:
    """A small AutoencoderKL, one layer a block, no attention; a level a channel count, 2^(levels−1) pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=1,  # the CPU backward of group norm is 10x slower with few channels a group
        mid_block_add_attention=False,
        latent_channels=4,
        sample_size=128,
        force_upcast=False,
    )


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """|d| + 4 d² + |chroma d| + 2 |8×8 mean of d|, means; images [B,3,S,S] in [-1, 1].

    Chroma is d less its mean over the channels. The last two terms are what keeps red from turning orange: a hue error
    of a whole object is small in PSNR and large in an 8×8 mean.
    """
    d = decoded.float() - images
    chroma = d - d.mean(1, keepdim=True)
    return d.abs().mean() + 4 * d.square().mean() + chroma.abs().mean() + 2 * F.avg_pool2d(d, 8).abs().mean()


def colour_anchor(mean: Tensor, images: Tensor) -> Tensor:
    """Mean of (z_c − 2 x̄_c)², c the first three latent channels, x̄ the 8×8 means of x; shapes [B,4,s,s], [B,3,8s,8s].

    Without it the encoder finds luminance first and stays there: colour errors of a whole object are cheap. With it
    three channels start as colour, which is also a smooth space to diffuse in.
    """
    return (mean[:, :3] - 2 * F.avg_pool2d(images, 8)).square().mean()


def anchor_weight(progress: float) -> float:
    """Linear from 1 at the start to 0.02 at 40 % of the budget, then constant."""
    return max(1 - progress / 0.4, 0.02)


def vae_loss(
    vae: AutoencoderKL, images: Tensor, generator: torch.Generator, kl_weight: float, anchor: float = 0.0
) -> dict[str, Tensor]:
    """Reconstruction through a posterior sample + kl_weight · mean KL a latent element + anchor · colour_anchor; also
    the PSNR in dB."""
    with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        posterior = vae.encode(images).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    decoded = vae.decode(mean + std * noise, return_dict=False)[0]
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    mse = (decoded.detach().float() - images).square().mean((1, 2, 3)) / 4
    return {
        "loss": reconstruction_loss(decoded, images) + kl_weight * kl + anchor * colour_anchor(mean, images),
        "psnr": -10 * mse.log10().mean(),
        "kl": kl.detach(),
        "latent_std": mean.detach().std(),
    }


def freeze_encoder(vae: AutoencoderKL) -> None:
    """Train only the decoder from here on, so that latents cached from this VAE stay valid."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def draw_images(pairs: Pairs, batch: int, generator: torch.Generator, crop: bool, device: str) -> Tensor:
    """Random source and target images in [-1, 1]: `batch` whole ones, or twice as many crops of half the side."""
    count = 2 * batch if crop else batch
    picks = torch.randint(2 * len(pairs), (count,), generator=generator)
    halves = (pairs.source, picks[picks < len(pairs)]), (pairs.target, picks[picks >= len(pairs)] - len(pairs))
    images = torch.cat([gather(stack, indices, device) for stack, indices in halves])
    images = random_crop(images, pairs.size // 2, generator) if crop else images
    return (2 * images - 1).to(memory_format=torch.channels_last)


def train_vae(
    pairs: Pairs, config: FitConfig, vae: AutoencoderKL, kl_weight: float = 1e-4, anchored: bool = True
) -> Path:
    """Train on both sides of the pairs and export the average to `work/vae`; half the steps see crops until p = 0.7.

    `anchored`: latents start as colours (`anchor_weight`); else, for a VAE that has learned, the last weight holds.
    """
    # eval mode: there is no dropout, and in train mode diffusers copies every shortcut's input
    vae = vae.to(memory_format=torch.channels_last).eval()
    trainer = Trainer(vae, config)

    def loss_fn(generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        crop = progress < 0.7 and torch.rand((), generator=generator).item() < 0.5
        images = draw_images(pairs, config.batch, generator, crop, config.device)
        with autocast(config):
            anchor = anchor_weight(progress if anchored else 1.0)
            return vae_loss(vae, images, generator, kl_weight, anchor)

    fit(trainer, loss_fn, lambda: export_vae(trainer, pairs))
    return config.work / "vae"


def export_vae(trainer: Trainer, pairs: Pairs) -> None:
    """Write the averaged VAE to `work/vae`, replacing it whole; its scaling factor is 1/std of 512 latents."""
    vae = trainer.ema_model()
    if next(trainer.model.encoder.parameters()).requires_grad:
        vae.register_to_config(scaling_factor=scaling_factor(vae, pairs, trainer.config))
    save_whole(trainer.config.work / "vae", vae)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, pairs: Pairs, config: FitConfig, count: int = 512) -> float:
    """1 / std of the posterior modes of `count` target images spread over the data set (LDM, app. G)."""
    indices = torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).long()
    with autocast(config):
        chunks = [
            vae.encode(2 * gather(pairs.target, chunk, config.device) - 1).latent_dist.mean.float()
            for chunk in indices.split(32)
        ]
    return round(1 / torch.cat(chunks).std().item(), 5)


def fingerprint(vae: AutoencoderKL) -> str:
    """Eight hex digits of the encoder's weights: latents of another encoder are something else."""
    digest = hashlib.sha256()
    for tensor in [*vae.encoder.state_dict().values(), *vae.quant_conv.state_dict().values()]:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def save_whole(folder: Path, *parts: Any) -> None:
    """Save every part into a temporary folder, then swap it in, so that a reader never sees half a model."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for part in parts:
        part.save_pretrained(temporary)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
