"""Correspondences to test with: random ones, identities, windows on a canvas; and the matrices they stand for."""

import itertools

import torch
from torch import Tensor

from csd3d.canvas.latents import pixel_grid
from csd3d.canvas.windows import Windows
from csd3d.editors.correspondence import Correspondence, window_correspondence

N, C, H, W = 4, 3, 5, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along_flow(flow: Tensor, validity: Tensor) -> Correspondence:
    """What i shows at p, j shows at p + flow_ij(p); `flow` [N, N, h, w, 2]."""
    return Correspondence(pixel_grid(*flow.shape[2:4]).to(flow) + flow, validity)


def windows_at(top: list, left: list, size: tuple[int, int], wrap: int | None = None) -> Correspondence:
    """Windows of one frame at these offsets."""
    top, left = torch.tensor(top), torch.tensor(left)
    return window_correspondence(Windows(torch.zeros(len(top)), top, left, size), wrap)


def bring(maps: Correspondence, values: Tensor, j: int, i: int) -> Tensor:
    """A_ij u_j: row j of `values` [N, C, h, w] on i's pixels, [C, h, w]."""
    return maps.validity[i, j] * maps.sample(values, i)[j]


def random_correspondence(seed: int = 0, count: int = N) -> Correspondence:
    """Flows of a few pixels, a fifth of the pixels out of sight, the others seen to a random share."""
    share = torch.rand(count, count, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return along_flow(1.5 * random(count, count, H, W, 2, seed=seed + 1), torch.where(share < 0.2, 0.0, share))


def identity(count: int = N, h: int = H, w: int = W) -> Correspondence:
    return along_flow(torch.zeros(count, count, h, w, 2), torch.ones(count, count, h, w))


def unrelated(count: int = N) -> Correspondence:
    return along_flow(torch.zeros(count, count, H, W, 2), torch.zeros(count, count, H, W))


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
