"""The noise ε of a step."""

import math

import torch
from torch import Tensor

from csd3d.waits import sent

NOISES = ("independent", "shared")
GIVEN = ("camera", "surface")  # of assets: functions of the camera, and of what it sees


def draw_noise(like: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Standard normal ε in the shape, dtype and device of `like` [N, ...]; float32 draws on the generator's own device.

    "independent": one draw per particle. "shared": one draw for all, so that ‖z_{t,i} − z_{t,j}‖² = ᾱ_t ‖z_i − z_j‖²
    and an SVGD kernel compares content instead of noise. Raises ValueError for another kind.
    """
    if kind not in NOISES:
        raise ValueError(f"noise is {kind!r}: choose one of {', '.join(NOISES)}")
    shape = like.shape if kind == "independent" else (1, *like.shape[1:])
    eps = torch.randn(shape, generator=generator, device=generator.device)
    return sent(eps.to(like.dtype), like.device).expand_as(like)


def add_noise(z: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε, DDPM (arXiv 2006.11239) Eq. 4."""
    return alpha_bar**0.5 * z + (1 - alpha_bar) ** 0.5 * eps


def implied_noise(z_t: Tensor, z: Tensor, alpha_bar: float) -> Tensor:
    """ε = (z_t − √ᾱ z)/√(1−ᾱ): `add_noise` solved for ε."""
    return (z_t - alpha_bar**0.5 * z) / (1 - alpha_bar) ** 0.5


def noise_map_size(size: tuple[int, int], fov_deg: float) -> tuple[int, int]:
    """Rows and columns of a `draw_noise_map` for views of `size` = (h, w) latents.

    The columns cover 360°, at fov_deg/w per pixel; the rows reach beyond −90° and 90° of elevation by half a view, so
    that every view lies inside.
    """
    height, width = size
    return math.ceil(180 * height / fov_deg) + height + 1, math.ceil(360 * width / fov_deg)


def draw_noise_map(channels: int, size: tuple[int, int], fov_deg: float, generator: torch.Generator) -> Tensor:
    """Standard normal ε around the object, [C, rows, columns], for `world_noise` of views of `size` latents."""
    return torch.randn(channels, *noise_map_size(size, fov_deg), generator=generator, device=generator.device)


def world_noise(noise_map: Tensor, azimuth_deg: Tensor, elevation_deg: Tensor, size: tuple[int, int]) -> Tensor:
    """Flow score distillation (Yan et al. 2024): ε [N, C, h, w] as a function of the camera, fixed for a run.

    It is the window of `noise_map` (`draw_noise_map`) at `azimuth_deg`, `elevation_deg` [N], periodic in azimuth. It
    moves by whole pixels, because interpolated noise would not be white.
    """
    height, width = size
    rows, columns = noise_map.shape[1:]
    left = (azimuth_deg / 360 * columns).round().long()
    top = ((90 - elevation_deg) / 180 * (rows - height - 1)).round().long()
    row = top[:, None] + torch.arange(height, device=top.device)
    column = (left[:, None] + torch.arange(width, device=left.device)) % columns
    return noise_map[:, row[:, :, None], column[:, None, :]].movedim(0, 1)
