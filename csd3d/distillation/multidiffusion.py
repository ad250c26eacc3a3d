"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): a canvas denoised through many overlapping windows.

Symbols: the canvas z [F, C, H, W] and its windows [M, C, h, w], which two callables of the caller's tell apart:

    gather(canvas) -> [M, C, h, w]     cuts every window out
    scatter(windows) -> canvas         its adjoint: adds every window up where it lies

and W [M | 1, 1, h, w] ≥ 0, how much a window counts at each of its pixels. Nothing here knows where windows lie, so a
canvas may as well wrap around, or be the frames of a video.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise, ddim_sample

Gather = Callable[[Tensor], Tensor]
Scatter = Callable[[Tensor], Tensor]
PredictWindows = Callable[[Tensor, int, Tensor], Tensor]  # (z_t [m, ...], t, which windows [m]) -> guided eps [m, ...]


def window_shares(weights: Tensor, canvas: Tensor, gather: Gather, scatter: Scatter) -> Tensor:
    """S_i = W_i / Σ_j W_j of every window at each of its pixels, [M, C, h, w]: scatter(S x) is the windows' mean.

    Exactly 1 where one window lies alone. Raises ValueError where weights are negative or leave a part of the canvas
    bare.
    """
    windows = gather(canvas)
    if not bool((weights >= 0).all()):
        raise ValueError("window weights must be at least 0")
    weights = weights.to(windows).expand_as(windows)
    total = scatter(weights)
    if bare := int((total <= 0).sum()):
        raise ValueError(f"windows leave {bare} of {total.numel()} places of the canvas bare: cover it all")
    return weights / gather(total)


def fused_predictor(
    predict: PredictWindows, gather: Gather, scatter: Scatter, shares: Tensor, batch: int
) -> PredictNoise:
    """The windows' predictions as one of the canvas, Σ_i F_i^-1(S_i ε(F_i(z_t))), for `ddim_sample` and its like.

    The paper fuses what each window becomes in a step, the minimiser of Σ_i |W_i (F_i(z) − Φ(F_i(z_t)))|² with one
    power of W; a DDIM step is affine in ε, the same for all windows, so fusing ε is the same thing. `batch` windows go
    into a call. With a single window it is `predict`, bit for bit.
    """

    def predict_canvas(z_t: Tensor, t: int) -> Tensor:
        windows = gather(z_t)
        parts = torch.arange(len(windows), device=windows.device).split(batch)
        return scatter(shares * torch.cat([predict(windows[part], t, part) for part in parts]))

    return predict_canvas


@torch.no_grad()
def multidiffusion_sample(
    predict: PredictWindows,
    z_t: Tensor,
    alphas_cumprod: Tensor,
    timesteps: list[int],
    *,
    gather: Gather,
    scatter: Scatter,
    weights: Tensor,
    batch: int = 64,
) -> Tensor:
    """Denoise the canvas `z_t` [F, C, H, W], at level timesteps[0], through the falling `timesteps` and on to ᾱ = 1.

    At every step all windows are predicted and fused, then the whole canvas takes one DDIM step. Raises ValueError as
    `window_shares` does.
    """
    shares = window_shares(weights, z_t, gather, scatter)
    return ddim_sample(fused_predictor(predict, gather, scatter, shares, batch), z_t, alphas_cumprod, timesteps)
