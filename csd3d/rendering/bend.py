"""How much the surfaces in depth maps bend, for a penalty that makes creases and dents smooth.

Depth maps are smoothed for scenes by RegNeRF (arXiv 2112.00724), normals for assets by threestudio. Here a plane costs
nothing, however it is seen, and an edge between two things next to nothing.
"""

import torch
from torch import Tensor

from csd3d.cameras import Cameras


def bend(depth: Tensor, opacity: Tensor, cameras: Cameras) -> Tensor:
    """The bend of what V views show, [..., V] from 0 to 2: means over pixels of κ² / (1 + κ²), both directions added.

    depth [..., V, H, W]: distances along the rays; opacity [..., V, H, W]: pixels below a half show nothing.
    κ = f z Δ²(1/z) is how much the slope of the surface changes from one pixel to the next, for z the distance along
    the viewing axis, f the focal length in pixels, Δ² the second difference. 1/z of a plane is linear in the picture,
    so its κ is 0; at an edge κ is large, and the gradient, of order κ⁻³, small.
    """
    cameras = cameras.to(depth.device)
    z, seen = (depth * _cosines(cameras)).clamp_min(1e-6), opacity > 0.5
    return _along_rows(z, seen, cameras.fx) + _along_rows(z.mT, seen.mT, cameras.fy)


def _along_rows(z: Tensor, seen: Tensor, focal: Tensor) -> Tensor:
    inner = z[..., 1:-1]
    second = 1 / z[..., :-2] - 2 / inner + 1 / z[..., 2:]
    shown = seen[..., :-2] & seen[..., 1:-1] & seen[..., 2:]
    square = torch.where(shown, focal.to(z)[:, None, None] * inner * second, 0).square()
    return (square / (1 + square)).sum((-2, -1)) / (z.shape[-2] * z.shape[-1])


def _cosines(cameras: Cameras) -> Tensor:
    """Cosine [V,H,W] of the angle between each pixel's ray and the viewing axis."""
    found = [-(cameras.image_rays(i)[1] @ cameras.camera_to_world[i, :, 2]) for i in range(len(cameras))]
    return torch.stack(found).view(-1, cameras.height, cameras.width)
