"""Deterministic sampling (DDIM, arXiv 2010.02502), and image editing with it as in Instruct-NeRF2NeRF."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from csd3d.distillation.noise import add_noise, draw_noise

PredictNoise = Callable[[Tensor, int], Tensor]  # (z_t [N, ...], t) -> guided eps [N, ...]


def ddim_timesteps(start: int, steps: int) -> list[int]:
    """At most `steps` timesteps falling evenly from `start` towards 0; fewer where rounding makes two equal.

    The list begins with `start`, as in Instruct-NeRF2NeRF.
    """
    if start < 0 or steps < 1:
        raise ValueError(f"DDIM needs start >= 0 and steps >= 1, got start {start} and steps {steps}")
    evenly = [round(start * (steps - k) / steps) for k in range(steps)]
    return list(dict.fromkeys(evenly))


def ddim_step(z_t: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """√ᾱ' ẑ_0 + √(1−ᾱ') ε with ẑ_0 = (z_t − √(1−ᾱ) ε)/√ᾱ: DDIM Eq. 12 with η = 0; ᾱ' = 1 returns ẑ_0."""
    z0 = (z_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    return add_noise(z0, eps, alpha_bar_next)


def ddim_sample(predict: PredictNoise, z_t: Tensor, alphas_cumprod: Tensor, timesteps: list[int]) -> Tensor:
    """Denoise `z_t`, at level timesteps[0], through the falling `timesteps` to ᾱ = 1."""
    alpha_bars = [alphas_cumprod[t].item() for t in timesteps] + [1.0]
    for t, (alpha_bar, alpha_bar_next) in zip(timesteps, pairwise(alpha_bars), strict=True):
        z_t = ddim_step(z_t, predict(z_t, t), alpha_bar, alpha_bar_next)
    return z_t


def ddim_invert(predict: PredictNoise, z: Tensor, alphas_cumprod: Tensor, timesteps: list[int]) -> Tensor:
    """Noise clean latents `z` through the rising `timesteps` by DDIM run backwards (section 4.3).

    Each step predicts at its start level, z_t' = √ᾱ' ẑ_0 + √(1−ᾱ') ε with ε, ẑ_0 of (z_t, t); the first step starts at
    ᾱ = 1 and predicts at timesteps[0]. With many steps, `ddim_sample` over the reversed list returns to z.
    """
    alpha_bars = [1.0] + [alphas_cumprod[t].item() for t in timesteps]
    for at, (alpha_bar, alpha_bar_next) in zip([timesteps[0], *timesteps], pairwise(alpha_bars), strict=False):
        z = ddim_step(z, predict(z, at), alpha_bar, alpha_bar_next)
    return z


@torch.no_grad()
def ddim_edit(
    predict: PredictNoise,
    z: Tensor,
    alphas_cumprod: Tensor,
    *,
    start: int,
    steps: int,
    generator: torch.Generator,
    noise: str = "independent",
) -> Tensor:
    """Noise clean latents `z` [N, ...] to timestep `start`, denoise by at most `steps` DDIM steps (arXiv 2303.12789).

    `predict(z_t, t)` gives the guided prediction; `alphas_cumprod` [T]. Returns clean latents [N, ...].
    """
    eps = draw_noise(z, noise, generator)
    z_t = add_noise(z, eps, alphas_cumprod[start].item())
    return ddim_sample(predict, z_t, alphas_cumprod, ddim_timesteps(start, steps))
