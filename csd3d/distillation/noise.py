"""Where the noise ε of a step comes from."""

import torch
from torch import Tensor

NOISES = ("independent", "shared")


def draw_noise(like: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Standard normal ε in the shape, dtype and device of `like` [N, ...]; float32 draws on the generator's own device.

    "independent": one draw a particle. "shared": one draw for all, so that ‖z_{t,i} − z_{t,j}‖² = ᾱ_t ‖z_i − z_j‖²
    and an SVGD kernel sees content instead of noise. Raises ValueError for another kind.
    """
    if kind not in NOISES:
        raise ValueError(f"noise is {kind!r}: choose one of {', '.join(NOISES)}")
    shape = like.shape if kind == "independent" else (1, *like.shape[1:])
    eps = torch.randn(shape, generator=generator, device=generator.device)
    return eps.to(like).expand_as(like)


def add_noise(z: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε, DDPM (arXiv 2006.11239) Eq. 4."""
    return alpha_bar**0.5 * z + (1 - alpha_bar) ** 0.5 * eps
