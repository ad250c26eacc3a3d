"""Models of diffusers behind the `Prior` interface: a codec, a text encoder and a noise predictor, put together.

Symbols as in `base`. All networks are frozen and in eval mode. Every weight is held in float32; the VAE and the text
encoders run in it, the noise predictor under autocast when a lower precision is asked for. Latents and images come back
as contiguous float32. Which kinds of model there are, and what each is made of: `kinds`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from csd3d.priors.base import Condition
from csd3d.priors.codecs import PixelCodec, VaeCodec
from csd3d.priors.flow import flow_noise
from csd3d.priors.text import TextEncoder
from csd3d.priors.unet import to_epsilon, unet_output


class DiffusersPrior:
    """A frozen diffusion model made of diffusers' and transformers' own modules (see `load_prior`).

    unet: the noise predictor, a UNet or the transformer of a flow model (`prediction_type` "flow"), on its device
    prediction_type: what it predicts: epsilon | v_prediction | sample | flow
    unet_dtype: of its matrix products; micro_batch: most elements sent through a network at once
    drop_text_encoder: the first `predict_noise` frees the text encoders, as `release_text_encoder` does
    """

    def __init__(
        self,
        codec: VaeCodec | PixelCodec,
        unet: nn.Module,
        text: TextEncoder,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        *,
        unet_dtype: torch.dtype = torch.float32,
        micro_batch: int = 16,
        drop_text_encoder: bool = False,
    ):
        self.codec, self.text = codec, text
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.device = next(unet.parameters()).device
        self.alphas_cumprod = alphas_cumprod.to(self.device, torch.float32)
        self.prediction_type = prediction_type
        self.unet_dtype = unet_dtype
        self.micro_batch = micro_batch
        self.drop_text_encoder = drop_text_encoder
        self.unet_evaluations = 0

    @property
    def vae(self) -> nn.Module:
        return self.codec.vae

    @property
    def text_encoder(self) -> nn.Module:
        return self.text.parts["text_encoder"]

    @property
    def tokenizer(self) -> Any:
        return self.text.parts["tokenizer"]

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def edits(self) -> bool:
        """Whether the model takes a source image beside z_t (InstructPix2Pix)."""
        return self.unet.config.in_channels == 2 * self.codec.channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of z for an image of `height` x `width` pixels, padded sizes included."""
        return self.codec.latent_shape(height, width)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z of images, differentiable; of a VAE the posterior's mode, or with a generator a sample.

        Raises ValueError for anything but [B, 3, H, W] with sides that the VAE can halve to a latent.
        """
        return self.codec.encode(self._normalised(images), generator, self.micro_batch).contiguous()

    def encode_condition(self, images: Tensor) -> Tensor:
        """The image condition of InstructPix2Pix: the posterior's mode, *not* scaled. ValueError for other models."""
        if not self.edits:
            raise ValueError("this model takes no image condition: an editing model (InstructPix2Pix) does")
        return self.codec.encode_condition(self._normalised(images), self.micro_batch).contiguous()

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images of z, of `size` = (H, W) if given; clamped to [0, 1] unless z wants a gradient."""
        images = self.codec.decode(z.float(), size, self.micro_batch) / 2 + 0.5
        return (images if images.requires_grad else images.clamp(0, 1)).contiguous()

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the VAE's encoder for a perceptual loss, differentiable: `conv_in`, then each down block.

        Raises ValueError for a pixel-space model, which has no VAE.
        """
        return self.codec.features(self._normalised(images))

    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, L, D], padded to the encoder's length as diffusers' pipelines do; each prompt is kept."""
        return self.text(prompts)["text"]

    def condition(self, prompts: list[str], image: Tensor | None = None) -> Condition:
        """What `predict_noise` takes for a batch of prompts: their embeddings, pooled ones too if the model has any."""
        return Condition(**self.text(prompts), image=image)

    def release_text_encoder(self) -> None:
        """Frees the text encoders. Prompts embedded before (or kept in the embedding cache) can still be asked for."""
        self.text.release()

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
        """ε(z_t; condition) [B, C, h, w], without guidance and without a graph, `micro_batch` elements at a time.

        Raises ValueError where batch, channels, t or the condition do not suit the model.
        """
        self._check(z_t, t, condition)
        if self.drop_text_encoder:
            self.release_text_encoder()
        steps = torch.as_tensor(t, device=self.device).expand(len(z_t))
        rows = [slice(i, i + self.micro_batch) for i in range(0, len(z_t), self.micro_batch)]
        self.unet_evaluations += len(z_t)
        return torch.cat([self._predict(z_t[row], steps[row], condition[row]) for row in rows]).contiguous()

    def _normalised(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W] in [0, 1], got {tuple(images.shape)}")
        return (images.to(self.device, torch.float32) * 2 - 1).to(memory_format=torch.channels_last)

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
        z_t, alpha_bar = z_t.float(), self.alphas_cumprod[t]
        if self.prediction_type == "flow":
            return flow_noise(self._network, z_t, alpha_bar, condition, self.num_train_timesteps)
        told_sizes = self.unet.config.get("addition_embed_type") == "text_time"
        picture_scale = self.codec.downscale if told_sizes else None
        output = unet_output(self._network, z_t, t, condition, picture_scale)
        return to_epsilon(output, z_t, alpha_bar, self.prediction_type)

    def _network(self, *args: Any, **options: Any) -> Tensor:
        with torch.autocast(self.device.type, self.unet_dtype, enabled=self.unet_dtype != torch.float32):
            return self.unet(*args, **options, return_dict=False)[0].float()
