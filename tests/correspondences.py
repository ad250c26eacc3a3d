"""Correspondences to test with: random ones, identities, windows on a canvas; and the matrices they stand for."""

import itertools

import torch
from torch import Tensor

from csd3d.distillation import Correspondence, flow_correspondence
from csd3d.distillation.correspondence import pixel_grid

N, C, H, W = 4, 3, 5, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_correspondence(seed: int = 0, count: int = N) -> Correspondence:
    """Flows of a few pixels, a fifth of the pixels out of sight, the others seen to a random share."""
    share = torch.rand(count, count, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return flow_correspondence(1.5 * random(count, count, H, W, 2, seed=seed + 1), torch.where(share < 0.2, 0.0, share))


def identity(count: int = N, h: int = H, w: int = W) -> Correspondence:
    return flow_correspondence(torch.zeros(count, count, h, w, 2), torch.ones(count, count, h, w))


def unrelated(count: int = N) -> Correspondence:
    return flow_correspondence(torch.zeros(count, count, H, W, 2), torch.zeros(count, count, H, W))


def pairs(count: int = N):
    return itertools.product(range(count), repeat=2)


def dense(maps: Correspondence, j: int, i: int) -> Tensor:
    """A_ij [h w, h w] from its definition, a weight for every pair of pixels."""
    gap = maps.positions[i, j].reshape(-1, 1, 2) - pixel_grid(H, W).reshape(1, -1, 2)
    return maps.validity[i, j].reshape(-1, 1) * (1 - gap.abs()).clamp_min(0).prod(-1)


def canvas_windows(canvas: Tensor, top: list[int], left: list[int], h: int, w: int) -> Tensor:
    """[N, C, h, w] cut from a canvas [C, H, W] that wraps horizontally."""
    columns = [(x + torch.arange(w)) % canvas.shape[2] for x in left]
    return torch.stack([canvas[:, y : y + h][:, :, c] for y, c in zip(top, columns, strict=True)])
