"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): a canvas denoised through many overlapping windows.

Symbols: the canvas z [F, C, H, W], its windows [M, C, h, w], and two callables of the caller:

    gather(canvas) -> [M, C, h, w]     cuts out every window
    scatter(windows) -> canvas         its adjoint: adds every window at its place

W [M | 1, 1, h, w] ≥ 0 is the weight of a window at each of its pixels. The places of windows are up to the callables,
so a canvas may wrap around, or be the frames of a video.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.samplers import Sampler, sample

Gather = Callable[[Tensor], Tensor]
Scatter = Callable[[Tensor], Tensor]
PredictWindows = Callable[[Tensor, int, Tensor], Tensor]  # (z_t [m, ...], t, which windows [m]) -> guided eps [m, ...]


def window_shares(weights: Tensor, canvas: Tensor, gather: Gather, scatter: Scatter) -> Tensor:
    """S_i = W_i / Σ_j W_j at each pixel of every window, [M, C, h, w]; scatter(S x) is the weighted mean of windows x.

    S is exactly 1 where only one window lies. Raises ValueError where weights are negative or leave a part of the
    canvas uncovered.
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
    """A prediction for the canvas, Σ_i F_i^-1(S_i ε(F_i(z_t))), for `samplers.sample`.

    The paper fuses the windows after their step, as the minimiser of Σ_i |W_i (F_i(z) − Φ(F_i(z_t)))|² with one power
    of W. A step of each sampler is affine in ε and the same for all windows, so fusing ε is equivalent. `batch` windows
    are predicted per call. With a single window it is exactly `predict`.
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
    sampler: Sampler = "ddim",
) -> Tensor:
    """Denoise the canvas `z_t` [F, C, H, W], at level timesteps[0], through the falling `timesteps` to ᾱ = 1.

    Every step predicts all windows, fuses the predictions and takes one step of the whole canvas. Raises the
    ValueErrors of `window_shares`.
    """
    shares = window_shares(weights, z_t, gather, scatter)
    fused = fused_predictor(predict, gather, scatter, shares, batch)
    return sample(fused, z_t, alphas_cumprod, timesteps, sampler)
