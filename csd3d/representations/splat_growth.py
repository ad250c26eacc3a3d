"""Where splats begin, and how they move to where they are needed (3DGS-MCMC, Kheradmand et al. 2024, arXiv 2404.09591).

Symbols: N splats, o opacities in [0, 1]; a splat is dead below the opacity `least`.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from csd3d.cameras import Cameras
from custom_kernels.splats import C0, Splats, rotation_matrices

if TYPE_CHECKING:
    from csd3d.representations.hashgrid import HashGridScene

FIRST_OPACITY = 0.1
MOST_COPIES = 16  # of a splat at a time
SPACING = 0.6  # first standard deviation as a share of the distance between neighbours
CHUNK = 2**12  # rays at a time
FAR = 20.0  # sizes of the box up to which an unbounded scene is filled at random


def new_splats(xyz: Tensor, rgb: Tensor, degree: int, largest: float) -> Splats:
    """Round splats at points [N, 3] of colours [N, 3], as wide as their neighbours are far, at most `largest`."""
    count = len(xyz)
    near = cKDTree(xyz.numpy()).query(xyz.numpy(), k=min(4, count))[0].reshape(count, -1)[:, 1:]
    size = torch.from_numpy(near.mean(1) if near.size else np.full(count, largest)).float()
    sizes = (SPACING * size).clamp(1e-4 * largest, largest).log()[:, None].repeat(1, 3)
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1)
    opacities = torch.full((count,), math.log(FIRST_OPACITY / (1 - FIRST_OPACITY)))
    return Splats(xyz, sizes, quats, opacities, (rgb - 0.5) / C0, torch.zeros(count, (degree + 1) ** 2 - 1, 3))


def random_points(
    aabb: Tensor, count: int, cameras: Cameras | None, unbounded: bool, generator: torch.Generator
) -> Tensor:
    """Points [count, 3]: in the box where most cameras see it, or, of an unbounded scene, also along their rays.

    Without cameras, as for an asset made from words, they are in a ball in the middle of the box.
    """
    low, high = aabb[:3], aabb[3:]
    if cameras is None:
        direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
        radius = 0.5 * torch.rand(count, 1, generator=generator) ** (1 / 3)
        return (low + high) / 2 + (high - low) / 2 * radius * direction
    far = 3 * count // 4 if unbounded else 0
    inside = low + (high - low) * torch.rand(4 * (count - far), 3, generator=generator)
    seen = torch.zeros(len(inside))
    for i in range(len(cameras)):
        pixels, depth = cameras.project(inside, i)
        frame = pixels.new_tensor((cameras.width, cameras.height))
        seen += ((pixels >= 0) & (pixels < frame)).all(1) & (depth > 0)
    inside = inside[seen.sort(descending=True, stable=True).indices[: count - far]]
    return torch.cat((inside, _along_rays(cameras, far, (high - low).max().item(), generator)))


def _along_rays(cameras: Cameras, count: int, size: float, generator: torch.Generator) -> Tensor:
    """Points [count, 3] on random rays, at distances from size / 4 to FAR sizes whose inverses are uniform."""
    which = torch.randint(len(cameras), (count,), generator=generator)
    frame = torch.tensor((cameras.width, cameras.height))
    rays_o, rays_d = cameras.rays(which, torch.rand(count, 2, generator=generator) * frame)
    nearness = torch.rand(count, 1, generator=generator) * (4 - 1 / FAR) + 1 / FAR
    return rays_o + rays_d * size / nearness


@torch.no_grad()
def surface_points(
    model: "HashGridScene", cameras: Cameras, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points and colours [n, 3] where random rays of the cameras meet a fitted scene's surfaces; n is at most count."""
    drawn = 2 * count  # some meet nothing
    which = torch.randint(len(cameras), (drawn,), generator=generator)
    frame = torch.tensor((cameras.width, cameras.height))
    rays_o, rays_d = cameras.rays(which, torch.rand(drawn, 2, generator=generator) * frame)
    parts = [model.render_rays(o, d) for o, d in zip(rays_o.split(CHUNK), rays_d.split(CHUNK), strict=True)]
    rgb, depth, opacity = (torch.cat([getattr(x, key).cpu() for x in parts]) for key in ("rgb", "depth", "opacity"))
    pick = (opacity > 0.5).nonzero()[:count, 0]
    return (rays_o + depth[:, None] * rays_d)[pick], rgb[pick].clamp(0, 1)


@torch.no_grad()
def move_dead(splats: Splats, least: float, extra: int, generator: torch.Generator) -> tuple[Splats, Tensor]:
    """Put dead splats, and `extra` new ones, beside living ones, drawn by opacity; the picture stays about the same.

        o' = 1 − (1 − o)^{1/n},   S' = S o / Σ_{i=1}^{n} Σ_{k=0}^{i−1} C(i−1, k) (−1)^k o'^{k+1} / √(k+1)

    n counts a splat and its copies (equation 9). Unlike there, copies are drawn from the Gaussian, which spreads them.
    Returns the splats, and the indices of all that have changed.
    """
    opacity = splats.opacities.sigmoid()
    alive = opacity > least  # False for NaN
    dead = (~alive).nonzero()[:, 0]
    wanted = len(dead) + extra
    if wanted == 0 or not alive.any():
        return splats, dead[:0]
    weights = torch.where(alive, opacity, 0).cpu()
    source = torch.multinomial(weights, wanted, replacement=True, generator=generator).to(dead.device)
    copies = torch.bincount(source, minlength=len(opacity))
    changed = copies.nonzero()[:, 0]
    value, shrink = _shares(opacity[changed], (copies[changed] + 1).clamp(max=MOST_COPIES))
    parts = splats._replace(opacities=splats.opacities.clone(), log_scales=splats.log_scales.clone())
    parts.opacities[changed] = value.clamp(max=1 - 1e-6).logit().clamp_min(math.log(least / (1 - least)) + 0.05)
    parts.log_scales[changed] += shrink.log()[:, None]
    place = torch.cat((dead, torch.arange(len(opacity), len(opacity) + extra, device=dead.device)))
    grown = [torch.cat((x, x[source[len(dead) :]])) for x in parts]
    for own, x in zip(grown, parts, strict=True):
        own[place] = x[source]
    noise = torch.randn(wanted, 3, generator=generator).to(dead.device) * splats.log_scales[source].exp()
    grown[0][place] += (rotation_matrices(splats.quats[source]) @ noise[..., None])[..., 0]
    return Splats(*grown), torch.cat((changed, place)).unique()


def _shares(opacity: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """o' and the factor on the size of each of `number` splats that share one of `opacity`."""
    opacity = opacity.double().clamp(1e-6, 1 - 1e-6)
    value = 1 - (1 - opacity) ** (1 / number)
    below = torch.zeros_like(value)
    for i in range(1, MOST_COPIES + 1):
        terms = [math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * value ** (k + 1) for k in range(i)]
        below += torch.where(number >= i, sum(terms), 0)
    return value.float(), (opacity / below).float()
