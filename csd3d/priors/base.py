"""What a method may ask of a diffusion model, and the condition it hands over with a batch of latents.

Symbols and shapes, here and in the other modules of this package:
  z    [B, C, h, w] clean latent in the UNet's scale (the VAE's times `scaling_factor`; pixels for a pixel-space prior)
  z_t  [B, C, h, w] noised latent √ᾱ_t z + σ_t ε, σ_t = √(1 − ᾱ_t)
  t    int, or [B] long, in 0..num_train_timesteps − 1;  ᾱ_t = `alphas_cumprod[t]`
  images [B, 3, H, W] in [0, 1]
Guidance is no business of a prior: a method asks for each branch and combines them itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the noise is predicted under: `text` [B, L, D], and for an editing model the source `image` [B, 4, h, w]."""

    text: Tensor
    image: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text.ndim != 3:
            raise ValueError(f"Condition.text must be [B, L, D], got {tuple(self.text.shape)}")
        if self.image is not None and (self.image.ndim != 4 or len(self.image) != len(self.text)):
            raise ValueError(f"Condition.image must be [{len(self.text)}, C, h, w], got {tuple(self.image.shape)}")

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return Condition(self.text[rows], None if self.image is None else self.image[rows])

    def expand(self, batch: int) -> "Condition":
        """Repeats a condition of one element `batch` times without copying."""
        image = None if self.image is None else self.image.expand(batch, -1, -1, -1)
        return Condition(self.text.expand(batch, -1, -1), image)

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Stacks conditions along the batch; all have an image or none has (ValueError)."""
        images = [condition.image for condition in conditions if condition.image is not None]
        if images and len(images) != len(conditions):
            raise ValueError(f"{len(images)} of {len(conditions)} conditions have an image: all must, or none")
        return Condition(torch.cat([condition.text for condition in conditions]), torch.cat(images) if images else None)


def edit_branches(text: Tensor, null_text: Tensor, image: Tensor) -> tuple[Condition, Condition, Condition]:
    """The three branches of InstructPix2Pix (arXiv 2211.09800, Eq. 3): (∅, ∅), (x̃, ∅), (x̃, y).

    `text` and `null_text` are [B | 1, L, D] embeddings of the instruction and of "", `image` [B, 4, h, w] is the
    *unscaled* posterior mode (`encode_condition`). The null image is a zero latent.
    """
    batch = len(image)
    null, full = (embedding.expand(batch, -1, -1) for embedding in (null_text, text))
    return Condition(null, torch.zeros_like(image)), Condition(null, image), Condition(full, image)


class Prior(Protocol):
    """A diffusion model as the methods see it: a VAE, a text encoder and a noise predictor, frozen."""

    alphas_cumprod: Tensor  # [T] float32
    num_train_timesteps: int
    unet_evaluations: int  # batch elements predicted so far; the caller may reset it

    @property
    def device(self) -> torch.device: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]: ...

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor: ...

    def encode_condition(self, images: Tensor) -> Tensor: ...

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor: ...

    def embed(self, prompts: list[str]) -> Tensor: ...

    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor: ...

    def features(self, images: Tensor) -> list[Tensor]: ...


def scaled_linear_alphas(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Stable Diffusion's ᾱ_t = Π (1 − β_s), √β linear in s (arXiv 2112.10752) -> [steps] float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)
