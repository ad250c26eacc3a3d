"""Image metrics. Images are `[H, W, 3]` or `[B, H, W, 3]` in [0, 1]; results are `[]` or `[B]`, one for each image."""

import torch
import torch.nn.functional as F
from kornia.metrics import ssim as kornia_ssim
from torch import Tensor

MSE_FLOOR = 1e-10  # identical images get 100 dB, because JSON has no infinity


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, `−10 log₁₀ MSE` in dB, at most 100; `[B, H, W, 3]` in [0, 1] → `[B]`.

    Raises ValueError when the shapes differ.
    """
    _same_shape(images, targets)
    return decibels((images - targets).square().mean((-3, -2, -1)))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), 11×11 Gaussian window, σ = 1.5, mean over windows inside.

    `[B, H, W, 3]` in [0, 1] → `[B]`. Raises ValueError when the shapes differ or a side is under 11 pixels.
    """
    _same_shape(images, targets)
    if min(images.shape[-3:-1]) < 11:
        raise ValueError(f"ssim needs images of at least 11 × 11 pixels, got {tuple(images.shape)}")
    batch = [x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).contiguous() for x in (images, targets)]
    return kornia_ssim(*batch, window_size=11, padding="valid").mean((1, 2, 3)).reshape(images.shape[:-3])


def psnr_outside(edited: Tensor, source: Tensor, edited_mask: Tensor, dilation: int = 2) -> Tensor:
    """PSNR over the pixels that the edit should not change: outside `edited_mask`, grown by `dilation` pixels.

    edited, source `[B, H, W, 3]` in [0, 1]; edited_mask `[B, H, W]` bool → `[B]` dB, NaN for an image without
    pixels outside (average with `torch.nanmean`).
    """
    _same_shape(edited, source)
    if edited_mask.shape != edited.shape[:-1]:
        raise ValueError(f"edited_mask is {tuple(edited_mask.shape)}, expected {tuple(edited.shape[:-1])}")
    outside = ~dilate(edited_mask, dilation)
    squared = (edited - source).square().mean(-1) * outside
    return decibels(squared.sum((-2, -1)) / outside.sum((-2, -1)))  # 0/0 gives the NaN


def psnr_weighted(images: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """PSNR of all pixels of a set together, each counted `weight` times; NaN if all weights are 0.

    images, targets `[..., B, H, W, 3]` in [0, 1], weight `[..., B, H, W]` ≥ 0 → `[...]` dB: one error for the B images.
    """
    squared = (images - targets).square().mean(-1) * weight
    return decibels(squared.sum((-3, -2, -1)) / weight.sum((-3, -2, -1)))


def ssim_weighted(images: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """`ssim`'s map, averaged over all pixels of `[B, H, W, 3]` with `weight` `[B, H, W]` → `[]`; NaN if all are 0."""
    _same_shape(images, targets)
    batch = [x.permute(0, 3, 1, 2).contiguous() for x in (images, targets)]
    found = kornia_ssim(*batch, window_size=11).mean(1)  # windows at the border see it mirrored
    return (found * weight).sum() / weight.sum()


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Grow a bool mask `[..., H, W]` by `pixels` in Chebyshev distance."""
    if pixels == 0:
        return mask.bool()
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return F.max_pool2d(flat, 2 * pixels + 1, stride=1, padding=pixels).bool().reshape(mask.shape)


def decibels(mse: Tensor) -> Tensor:
    """−10 log₁₀ of a mean squared error, at most 100 dB."""
    return -10.0 * torch.log10(mse.clamp_min(MSE_FLOOR))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.shape[-1] != 3:
        raise ValueError(f"expected two equal shapes [..., H, W, 3], got {tuple(a.shape)} and {tuple(b.shape)}")
