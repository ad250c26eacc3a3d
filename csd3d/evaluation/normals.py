"""Whether an asset's depth and its density tell of the same surface: Eval3D's geometric consistency, from the field.

Eval3D (Duggal et al. 2025, arXiv 2504.18509) compares rendered normals with those of a depth that a network reads off
the picture. Here both come from the asset: normals of the rendered depth, and those of the density at that depth. On a
clear surface they agree; in foam, fog and noise they do not.
Symbols: V views of S² pixels; points [..., 3] in world units.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.representations.base import OPAQUE

ALIKE_DEG = 30.0  # largest mean angle around a pixel at which its normals agree; Eval3D: 0.3 rad of halved vectors
WINDOW = 3  # side in pixels of the square that angles are averaged over; Eval3D: 11 of 512
AT_ONCE = 1 << 16  # points whose density is asked for together


@torch.no_grad()
def normal_consistency(
    depth: Tensor, opacity: Tensor, cameras: Cameras, density: Callable[[Tensor], Tensor], device: torch.device
) -> float | None:
    """Share of the surface's pixels, of all views, on which both normals agree within `ALIKE_DEG`; None if it has none.

    depth, opacity [V,S,S], depth along the ray; density(points [P,3] on `device`): σ [P]. Angles are averaged over
    `WINDOW`² pixels. A pixel with no neighbour on the surface, or with no gradient of the density, does not agree.
    """
    alike = count = 0
    for i in range(len(depth)):
        solid = opacity[i] > OPAQUE
        if not bool(solid.any()):
            continue
        rays_o, rays_d = (rays.view(*solid.shape, 3) for rays in cameras.image_rays(i))
        points = rays_o + rays_d * depth[i][..., None]
        by_depth = depth_normals(points, depth[i], solid, rays_d)[solid]
        steps = depth[i][solid] / cameras.fx[i]  # a pixel's width there: what pictures can show
        by_density = density_normals(points[solid], steps, density, device)
        angle = torch.zeros_like(depth[i])
        angle[solid] = torch.rad2deg(torch.acos((by_depth * by_density).sum(-1).clamp(-1, 1)))
        kept = solid.to(angle)
        mean, share = (F.avg_pool2d(x[None, None], WINDOW, 1, WINDOW // 2)[0, 0] for x in (angle * kept, kept))
        alike += int((mean[solid] / share[solid] < ALIKE_DEG).sum())
        count += int(solid.sum())
    return alike / count if count else None


def depth_normals(points: Tensor, depth: Tensor, solid: Tensor, rays_d: Tensor) -> Tensor:
    """Unit normals [S,S,3] of the surface through `points` [S,S,3], towards the camera; 0 where there is none.

    Of the two neighbours along each axis the one that is nearer in depth is taken, so that an edge before something
    further away is no fault.
    """
    across, down = (_difference(points, depth, solid, axis) for axis in (1, 0))
    normals = F.normalize(torch.linalg.cross(across, down), dim=-1)
    return torch.where((normals * rays_d).sum(-1, keepdim=True) > 0, -normals, normals)


def _difference(points: Tensor, depth: Tensor, solid: Tensor, axis: int) -> Tensor:
    """Each point's step [S,S,3] to its neighbour along an axis, 0 where neither is solid."""
    found, nearest = torch.zeros_like(points), torch.full_like(depth, math.inf)
    for turn in (1, -1):
        there = torch.roll(solid, turn, axis) & solid
        there.select(axis, 0 if turn == 1 else -1)[:] = False  # nothing lies beyond the border
        apart = (torch.roll(depth, turn, axis) - depth).abs()
        better = there & (apart < nearest)
        found = torch.where(better[..., None], torch.roll(points, turn, axis) - points, found)
        nearest = torch.where(better, apart, nearest)
    return found


def density_normals(points: Tensor, steps: Tensor, density: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Unit normals −∇σ/‖∇σ‖ [P,3] at points [P,3], by differences over ± `steps` [P]; 0 where the density is even."""
    offsets = torch.cat((torch.eye(3), -torch.eye(3))).to(points)
    around = points[:, None] + offsets * steps[:, None, None]  # [P,6,3]
    parts = [density(part.to(device)).reshape(-1).cpu() for part in around.view(-1, 3).split(AT_ONCE)]
    sigma = torch.cat(parts).view(-1, 6).to(points)
    return F.normalize(sigma[:, 3:] - sigma[:, :3], dim=-1)
