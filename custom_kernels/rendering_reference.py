"""The torch reference of rendering.py, for any device and dtype, and what all its backends share."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_THICKNESS = 100.0  # exp(-100) is 0 in float32; keeps the reference's running sums finite
_CHUNK = 2**20  # steps that the reference marches at once


@dataclass(frozen=True)
class Grid:
    """Nested occupancy grids: level l covers `aabb` scaled by 2^l about its centre; the finest at a point is used.

    occupancy [levels, G, G, G] bool, indexed x, y, z; aabb [6] float32 (min, max), world units. Do not modify them
    afterwards: make a new Grid.
    """

    occupancy: Tensor
    aabb: Tensor

    def __post_init__(self) -> None:
        levels, *shape = self.occupancy.shape
        if self.occupancy.dim() != 4 or len(set(shape)) != 1 or self.occupancy.dtype != torch.bool:
            raise ValueError(
                f"occupancy must be bool [levels, G, G, G], got {self.occupancy.dtype} {list(self.occupancy.shape)}"
            )
        if levels > 1 and shape[0] % 16:
            raise ValueError(f"nested grids need a resolution divisible by 16, so that blocks nest; got {shape[0]}")
        if self.aabb.shape != (6,):
            raise ValueError(f"aabb must be [6] (min, max), got {list(self.aabb.shape)}")

    @functools.cached_property
    def blocks(self) -> Tensor:
        """Which blocks of 4^3 cells have an occupied one, [levels, B, B, B] bool; the march skips the others."""
        return torch.nn.functional.max_pool3d(self.occupancy.float()[:, None], 4, ceil_mode=True)[:, 0] > 0


@dataclass(frozen=True)
class Steps:
    """Steps along a ray: t_0 = t_min + jitter dt(t_min), t_{k+1} = t_k + dt(t_k), dt(t) = max(size, cone_angle t).

    With cone_angle > 0 steps grow with distance, as in instant-ngp (Mueller et al. 2022, app. E.1). A ray stops after
    `max_samples` samples.
    """

    size: float
    cone_angle: float = 0.0
    max_samples: int = 2**31 - 1

    def __post_init__(self) -> None:
        if not (self.size > 0 and self.cone_angle >= 0 and self.max_samples > 0):
            raise ValueError(f"steps need size > 0, cone_angle >= 0 and max_samples > 0, got {self}")


class Samples(NamedTuple):
    """Packed samples: t_starts [S], t_ends [S], ray_indices [S] int64, packed_info [R, 2] int64."""

    t_starts: Tensor
    t_ends: Tensor
    ray_indices: Tensor
    packed_info: Tensor


class Composite(NamedTuple):
    """rgb [R, 3]; depth [R], sum_k w_k t_k, not divided by opacity; opacity [R] in [0, 1]; weights [S]."""

    rgb: Tensor
    depth: Tensor
    opacity: Tensor
    weights: Tensor


def transmittance(sigmas: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor) -> Tensor:
    """Share of light that reaches each sample, T_k = exp(-sum_{j<k} sigma_j dt_j), [S] in [0, 1]."""
    thickness = (sigmas * (t_ends - t_starts)).clamp(max=_MAX_THICKNESS)
    return torch.exp(-exclusive_sum(thickness, packed_info)).to(sigmas.dtype)


def exclusive_sum(values: Tensor, packed_info: Tensor) -> Tensor:
    """Sum of values [S] over the earlier samples of the same ray, [S]; float64, from one running sum over all rays."""
    before = values.double().cumsum(0) - values
    starts, counts = packed_info.unbind(1)
    occupied = counts > 0
    return before - before[starts[occupied]].repeat_interleave(counts[occupied], output_size=len(values))


def expand_rays(packed_info: Tensor, size: int) -> Tensor:
    """Ray index of each of the `size` samples, [S] int64."""
    rays = torch.arange(len(packed_info), device=packed_info.device)
    return rays.repeat_interleave(packed_info[:, 1], output_size=size)


def pack(counts: Tensor) -> Tensor:
    """packed_info of rays with so many samples [R]."""
    return torch.stack([counts.cumsum(0) - counts, counts], dim=1)


def ends(
    rays_o: Tensor, t_min: Tensor, t_max: Tensor, grid: Grid, steps: Steps, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the first step starts, and beyond which there is no sample, float64 [R]: t_max, or where no cell can be."""
    centre, half = box(grid)
    reach = (rays_o - centre).norm(dim=1) + half.norm() * 2 ** (len(grid.occupancy) - 1)
    t_min = t_min.double()
    return t_min + jitter * torch.clamp(t_min * steps.cone_angle, min=steps.size), torch.minimum(t_max.double(), reach)


def box(grid: Grid) -> tuple[Tensor, Tensor]:
    """Centre and half extent, float64 [3]."""
    return (grid.aabb[3:].double() + grid.aabb[:3]) / 2, (grid.aabb[3:].double() - grid.aabb[:3]) / 2


def march_reference(rays_o: Tensor, rays_d: Tensor, start: Tensor, t_max: Tensor, grid: Grid, steps: Steps) -> Samples:
    """Look up every step, some rays at a time; in float64 like the native march, to find the same cells."""
    centre, half = box(grid)
    number = _steps_until(start, t_max, steps)
    per_chunk = max(1, _CHUNK // max(number, 1))
    kept = []
    for rays in torch.arange(len(rays_o), device=rays_o.device).split(per_chunk):
        edges = _edges(start[rays], number, steps)
        middle = (edges[:, :-1] + edges[:, 1:]) / 2
        points = (rays_o[rays, None] - centre) / half + (rays_d[rays, None] / half) * middle[..., None]
        mask = _occupied(points, grid.occupancy) & (middle < t_max[rays, None])
        mask &= mask.cumsum(1) <= steps.max_samples
        kept.append((edges[:, :-1][mask], edges[:, 1:][mask], rays.repeat_interleave(mask.sum(1))))
    t_starts, t_ends, ray_indices = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return Samples(
        t_starts.to(rays_o), t_ends.to(rays_o), ray_indices, pack(torch.bincount(ray_indices, minlength=len(rays_o)))
    )


def _steps_until(start: Tensor, t_max: Tensor, steps: Steps) -> int:
    """Number of steps that take every ray past its t_max."""
    reached = start < t_max  # NaN: false
    if not reached.any():
        return 0
    start, t_max = start[reached], t_max[reached]
    if steps.cone_angle == 0:
        return int(((t_max - start) / steps.size).max()) + 2
    turn = torch.clamp(start, min=steps.size / steps.cone_angle)  # from here on, steps grow
    number = (torch.minimum(turn, t_max) - start) / steps.size + (t_max / turn).log().clamp(min=0) / math.log1p(
        steps.cone_angle
    )
    return int(number.max()) + 3


def _edges(start: Tensor, number: int, steps: Steps) -> Tensor:
    """t_0 .. t_number of each ray, [R, number + 1]: n steps of `size`, then geometric with ratio 1 + cone_angle."""
    k = torch.arange(number + 1, device=start.device, dtype=start.dtype)
    if steps.cone_angle == 0:
        return start[:, None] + k * steps.size
    n = torch.ceil((steps.size / steps.cone_angle - start) / steps.size).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(k, n) * steps.size) * (1 + steps.cone_angle) ** (k - n).clamp(min=0)


def _occupied(points: Tensor, occupancy: Tensor) -> Tensor:
    """Look up points [..., 3], in coordinates where level l covers [-2^l, 2^l]^3."""
    levels, resolution = occupancy.shape[:2]
    extent = points.abs().amax(-1)
    level = sum((extent > 2**l).long() for l in range(levels - 1)) + torch.zeros_like(extent, dtype=torch.long)
    inside = extent <= 2 ** (levels - 1)  # NaN: false
    scaled = (points / (2.0**level)[..., None] + 1) * 0.5 * resolution
    x, y, z = torch.where(inside[..., None], scaled, 0).long().clamp(max=resolution - 1).unbind(-1)
    return occupancy[level, x, y, z] & inside


def composite_reference(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor
) -> Composite:
    """`composite`."""
    alphas = -torch.expm1(-sigmas * (t_ends - t_starts))
    weights = transmittance(sigmas, t_starts, t_ends, packed_info) * alphas
    return accumulate(weights, rgbs, t_starts, t_ends, packed_info)


def accumulate(weights: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor) -> Composite:
    """What is rendered with the weights [S]."""
    values = torch.cat([rgbs, (t_starts + t_ends)[:, None] / 2, torch.ones_like(weights)[:, None]], dim=1)
    sums = values.new_zeros(len(packed_info), 5)
    sums = sums.index_add(0, expand_rays(packed_info, len(weights)), weights[:, None] * values)
    return Composite(sums[:, :3], sums[:, 3], sums[:, 4], weights)
