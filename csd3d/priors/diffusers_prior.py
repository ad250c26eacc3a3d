"""Stable Diffusion and InstructPix2Pix behind the `Prior` interface: any latent diffusion UNet that diffusers loads.

Symbols as in `base`. All networks are frozen and in eval mode; the VAE and the text encoder run in float32, the UNet
under autocast when a lower precision is asked for. Latents and images come back as contiguous float32.
"""

import logging

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from csd3d.priors.base import Condition

logger = logging.getLogger("csd3d")


def to_epsilon(output: Tensor, z_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Turns a network's output into the noise ε it implies.

        v_prediction: v = √ᾱ ε − σ z    =>  ε = √ᾱ v + σ z_t           (arXiv 2202.00512, appendix D)
        sample:       z_t = √ᾱ z + σ ε  =>  ε = (z_t − √ᾱ z) / σ

    `output`, `z_t` [B, C, h, w]; `alpha_bar` [B]. Raises ValueError for another prediction type.
    """
    a, sigma = (value.sqrt().reshape(-1, 1, 1, 1) for value in (alpha_bar, 1 - alpha_bar))
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return a * output + sigma * z_t
    if prediction_type == "sample":
        return (z_t - a * output) / sigma
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


class DiffusersPrior:
    """A frozen latent diffusion model made of diffusers' and transformers' own modules (see `load_prior`).

    Sizes need not divide by the VAE's factor: images are padded at the right and bottom by reflection before they are
    encoded, and `decode(z, size)` crops the padding off again.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        *,
        unet_dtype: torch.dtype = torch.float32,
        micro_batch: int = 16,
    ):
        self.vae, self.unet, self.text_encoder = (m.eval().requires_grad_(False) for m in (vae, unet, text_encoder))
        for convolutional in (vae, unet):
            convolutional.to(memory_format=torch.channels_last)
        self.tokenizer = tokenizer
        self.device = next(unet.parameters()).device
        self.alphas_cumprod = alphas_cumprod.to(self.device, torch.float32)
        self.prediction_type = prediction_type
        self.unet_dtype = unet_dtype
        self.micro_batch = micro_batch
        self.unet_evaluations = 0
        self._embeddings: dict[str, Tensor] = {}

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def downscale(self) -> int:
        """Pixels to one latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels, padded sizes included."""
        return self.vae.config.latent_channels, -(-height // self.downscale), -(-width // self.downscale)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents z = scaling_factor · E(images), differentiable: the posterior's mode, or with a generator a sample.

        Raises ValueError for anything but [B, 3, H, W] with sides of at least `downscale` pixels.
        """
        posterior = self._posterior(images)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return (z * self.vae.config.scaling_factor).contiguous()

    def encode_condition(self, images: Tensor) -> Tensor:
        """The image condition of InstructPix2Pix: the posterior's mode, *not* scaled."""
        return self._posterior(images).mode().contiguous()

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images of latents, cropped to `size` = (H, W) if given; clamped to [0, 1] unless z wants a gradient."""
        chunks = (z.float() / self.vae.config.scaling_factor).split(self.micro_batch)
        images = torch.cat([self.vae.decode(chunk, return_dict=False)[0] for chunk in chunks]) / 2 + 0.5
        if size is not None:
            images = _crop(images, size)
        return (images if images.requires_grad else images.clamp(0, 1)).contiguous()

    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, D], padded to the encoder's length as diffusers' pipelines do; each prompt is kept."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                self._embeddings[prompt] = self._embed(prompt)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """ε(z_t; condition) [B, C, h, w], without guidance and without a graph, `micro_batch` elements at a time.

        Raises ValueError where batch, channels or t do not suit the UNet.
        """
        self._check(z_t, t, condition)
        steps = torch.as_tensor(t, device=self.device).expand(len(z_t))
        rows = [slice(i, i + self.micro_batch) for i in range(0, len(z_t), self.micro_batch)]
        self.unet_evaluations += len(z_t)
        return torch.cat([self._predict(z_t[row], steps[row], condition[row]) for row in rows]).contiguous()

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the VAE's encoder for a perceptual loss, differentiable: `conv_in`, then each down block."""
        encoder = self.vae.encoder
        maps = [encoder.conv_in(self._to_vae(images))]
        for block in encoder.down_blocks:
            maps.append(block(maps[-1]))
        return maps

    def _to_vae(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [0, 1], got {tuple(images.shape)}")
        return (images.to(self.device, torch.float32) * 2 - 1).to(memory_format=torch.channels_last)

    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        chunks = self._pad(self._to_vae(images)).split(self.micro_batch)
        return DiagonalGaussianDistribution(torch.cat([self.vae.encode(x).latent_dist.parameters for x in chunks]))

    def _pad(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.downscale:
            raise ValueError(f"images must be at least {self.downscale} pixels a side, got {height}x{width}")
        if height % self.downscale == 0 and width % self.downscale == 0:
            return images
        return F.pad(images, (0, -width % self.downscale, 0, -height % self.downscale), mode="reflect")

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
        limit = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        self._warn_of_lost_text(prompt, limit)
        tokens = self.tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.device)
        # diffusers masks the padding for the few text encoders that were trained so, and for no other
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0].float()

    def _warn_of_lost_text(self, prompt: str, limit: int) -> None:
        ids = self.tokenizer(prompt, verbose=False).input_ids
        if len(ids) > limit:
            cut = self.tokenizer.decode(ids[limit - 1 : -1])
            logger.warning(
                "prompt %r is longer than the text encoder takes (%d tokens): cut off %r", prompt, limit, cut
            )
        if self.tokenizer.unk_token_id in ids[1:-1]:
            logger.warning("prompt %r holds characters that the text encoder's vocabulary lacks", prompt)

    def _check(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> None:
        image_channels = 0 if condition.image is None else condition.image.shape[1]
        if z_t.ndim != 4 or z_t.shape[1] + image_channels != self.unet.config.in_channels:
            raise ValueError(
                f"the UNet takes {self.unet.config.in_channels} channels, got z_t {tuple(z_t.shape)} and "
                f"{image_channels} of an image condition"
            )
        if len(condition) != len(z_t):
            raise ValueError(f"z_t has a batch of {len(z_t)}, its condition of {len(condition)}")
        if isinstance(t, int) and not 0 <= t < self.num_train_timesteps:
            raise ValueError(f"t must be in 0..{self.num_train_timesteps - 1}, got {t}")

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sample = z_t if condition.image is None else torch.cat([z_t, condition.image], dim=1)
        sample = sample.float().to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.unet_dtype, enabled=self.unet_dtype != torch.float32):
            output = self.unet(sample, t, encoder_hidden_states=condition.text, return_dict=False)[0]
        return to_epsilon(output.float(), z_t.float(), self.alphas_cumprod[t], self.prediction_type)


def _crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    if height > images.shape[-2] or width > images.shape[-1]:
        raise ValueError(f"size {height}x{width} is larger than the {images.shape[-2]}x{images.shape[-1]} decoded")
    return images[..., :height, :width]
