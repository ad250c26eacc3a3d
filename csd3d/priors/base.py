"""What a method may ask of a diffusion model, and the condition it hands over with a batch of latents.

Symbols and shapes, here and in the other modules of this package:
  z    [B, C, h, w] clean latent in the UNet's scale (the VAE's times `scaling_factor`; pixels for a pixel-space prior)
  z_t  [B, C, h, w] noised latent √ᾱ_t z + σ_t ε, σ_t = √(1 − ᾱ_t)
  t    int, or [B] long, in 0..num_train_timesteps − 1;  ᾱ_t = `alphas_cumprod[t]`
  images [B, 3, H, W] in [0, 1]
Guidance is no business of a prior: a method asks for each branch and combines them itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the noise is predicted under: `text` [B, L, D], and for an editing model the source `image` [B, 4, h, w].

    Models with a second, pooled description of the prompt (SDXL, Stable Diffusion 3) need it in `pooled` [B, P]:
    `Prior.condition` fills it in. `time_ids` [B, 6] are SDXL's (height, width) of the source, (top, left) of its crop
    and (height, width) of the target, in pixels; where it is None they stand for the whole picture that z_t is.
    """

    text: Tensor
    image: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text.ndim != 3:
            raise ValueError(f"Condition.text must be [B, L, D], got {tuple(self.text.shape)}")
        if self.image is not None and (self.image.ndim != 4 or len(self.image) != len(self.text)):
            raise ValueError(f"Condition.image must be [{len(self.text)}, C, h, w], got {tuple(self.image.shape)}")
        for name, width in (("pooled", "P"), ("time_ids", 6)):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or len(value) != len(self.text)):
                raise ValueError(f"Condition.{name} must be [{len(self.text)}, {width}], got {tuple(value.shape)}")

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self._map(lambda value: value[rows])

    def expand(self, batch: int) -> "Condition":
        """Repeats a condition of one element `batch` times without copying."""
        return self._map(lambda value: value.expand(batch, *value.shape[1:]))

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Stacks conditions along the batch; all have an image (pooled text, ...) or none has (ValueError)."""
        parts = {}
        for name in (field.name for field in fields(Condition)):
            present = [value for condition in conditions if (value := getattr(condition, name)) is not None]
            if present and len(present) != len(conditions):
                raise ValueError(f"{len(present)} of {len(conditions)} conditions have `{name}`: all must, or none")
            parts[name] = torch.cat(present) if present else None
        return Condition(**parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Condition(**{name: None if value is None else function(value) for name, value in values.items()})


def edit_branches(
    text: Tensor | Condition, null_text: Tensor | Condition, image: Tensor
) -> tuple[Condition, Condition, Condition]:
    """The three branches of InstructPix2Pix (arXiv 2211.09800, Eq. 3): (∅, ∅), (x̃, ∅), (x̃, y).

    `text` and `null_text` are [B | 1, L, D] embeddings of the instruction and of "" (as `Condition`s where the model
    takes pooled text too), `image` [B, 4, h, w] is the *unscaled* posterior mode (`encode_condition`). The null image
    is a zero latent.
    """
    given = (words if isinstance(words, Condition) else Condition(words) for words in (null_text, text))
    null, full = (words.expand(len(image)) for words in given)
    return replace(null, image=torch.zeros_like(image)), replace(null, image=image), replace(full, image=image)


class Prior(Protocol):
    """A diffusion model as the methods see it: an image codec, a text encoder and a noise predictor, frozen.

    `condition(prompts, image)` is what every kind of model takes; `Condition(embed(prompts), image)` is the same for
    models without pooled text.
    """

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

    def condition(self, prompts: list[str], image: Tensor | None = None) -> Condition: ...

    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor: ...

    def features(self, images: Tensor) -> list[Tensor]: ...


def scaled_linear_alphas(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Stable Diffusion's ᾱ_t = Π (1 − β_s), √β linear in s (arXiv 2112.10752) -> [steps] float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0)
