"""Volume rendering of packed samples: `march` finds the samples in occupied cells, `composite` renders them.

Symbols, here and in cpu/rendering.cpp: R rays, S samples; a ray is o + t d, t in world units where d is of unit length.
A sample is the interval [t_start, t_end]; packed_info [R, 2] int64 holds each ray's (first sample, number of samples),
rays in order and samples front to back.

Backends: `reference` (torch, any device and dtype), `native` (C++, float32 on the CPU; bit-identical for any number of
threads), `nerfacc` (its CUDA ops, float32 on a GPU); `auto` chooses the fastest available.
"""

import functools
import importlib.util
import logging
import math
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from custom_kernels import native
from custom_kernels.rendering_native import composite_native, march_native

BACKENDS = ("auto", "reference", "native", "nerfacc")
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


@torch.no_grad()
def march(
    rays_o: Tensor,
    rays_d: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    grid: Grid,
    steps: Steps,
    jitter: Tensor | None = None,
    backend="auto",
) -> Samples:
    """Samples of each ray: the steps whose midpoint lies in an occupied cell and before t_max.

    rays_o, rays_d [R, 3] (d of unit length); t_min, t_max [R], t_min >= 0; jitter [R] in [0, 1), None for 0.
    Not differentiable. A ray that is not finite has no samples.
    Raises ValueError on other shapes, RuntimeError if a backend chosen by name is missing.
    """
    rays = len(rays_o)
    jitter = torch.zeros_like(t_min) if jitter is None else jitter
    shapes = [tuple(x.shape) for x in (rays_o, rays_d, t_min, t_max, jitter)]
    if shapes != [(rays, 3)] * 2 + [(rays,)] * 3:
        raise ValueError(f"march takes rays [R, 3] twice and t_min, t_max, jitter [R], got {shapes}")
    chosen = _choose(backend, rays_o, t_min, t_max, jitter)
    if chosen == "native":
        args = [
            x.contiguous()
            for x in (rays_o, rays_d, t_min, t_max, jitter, grid.occupancy, grid.blocks, grid.aabb.float())
        ]
        return Samples(*march_native(*args, steps.size, steps.cone_angle, steps.max_samples))
    return (_march_nerfacc if chosen == "nerfacc" else _march_reference)(
        rays_o, rays_d, t_min, t_max, grid, steps, jitter
    )


def composite(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor, backend: str = "auto"
) -> Composite:
    """Emission-absorption rendering of packed samples (Max 1995; NeRF, Mildenhall et al. 2020, eq. 3).

    alpha_k = 1 - exp(-sigma_k dt_k),  w_k = alpha_k prod_{j<k} (1 - alpha_j),  rgb = sum_k w_k rgb_k,
    depth = sum_k w_k t_k (midpoints),  opacity = sum_k w_k.  No background is added; a ray without samples is zero.

    sigmas [S] >= 0 (1 / world unit), rgbs [S, 3], t_starts, t_ends [S], packed_info [R, 2]. Differentiable in sigmas
    and rgbs; the reference also in t. Raises ValueError on other shapes and on a gradient that the backend lacks.
    """
    count = len(sigmas)
    shapes = [tuple(x.shape) for x in (sigmas, rgbs, t_starts, t_ends, packed_info)]
    if shapes != [(count,), (count, 3), (count,), (count,), (len(packed_info), 2)]:
        raise ValueError(
            f"composite takes sigmas [S], rgbs [S, 3], t_starts, t_ends [S], packed_info [R, 2], got {shapes}"
        )
    lengths_need_grad = t_starts.requires_grad or t_ends.requires_grad
    chosen = _choose(
        "reference" if backend == "auto" and lengths_need_grad else backend, sigmas, rgbs, t_starts, t_ends
    )
    if chosen != "native":
        return (_composite_nerfacc if chosen == "nerfacc" else _composite_reference)(
            sigmas, rgbs, t_starts, t_ends, packed_info
        )
    if lengths_need_grad:
        raise ValueError("backend 'native' has no gradient for t_starts and t_ends: use backend 'reference'")
    return Composite(*composite_native(sigmas, rgbs, t_starts, t_ends, packed_info)[:4])


def transmittance(sigmas: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor) -> Tensor:
    """Share of light that reaches each sample, T_k = exp(-sum_{j<k} sigma_j dt_j), [S] in [0, 1]."""
    thickness = (sigmas * (t_ends - t_starts)).clamp(max=_MAX_THICKNESS)
    return torch.exp(-exclusive_sum(thickness, packed_info)).to(sigmas.dtype)


def keep(samples: Samples, mask: Tensor) -> Samples:
    """The samples where mask [S] is true, packed again."""
    t_starts, t_ends, ray_indices = (x[mask] for x in samples[:3])
    return Samples(
        t_starts, t_ends, ray_indices, _pack(torch.bincount(ray_indices, minlength=len(samples.packed_info)))
    )


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


def _pack(counts: Tensor) -> Tensor:
    return torch.stack([counts.cumsum(0) - counts, counts], dim=1)


# ---- choice of backend


@functools.cache
def nerfacc_has_cuda() -> bool:
    """Whether nerfacc's CUDA ops are compiled or can be: needs CUDA, and either nerfacc's wheel or a compiler."""
    if not torch.cuda.is_available() or importlib.util.find_spec("nerfacc") is None:
        return False
    found = importlib.util.find_spec("nerfacc.csrc") is not None or shutil.which("nvcc") is not None
    if not found:
        logging.getLogger("custom_kernels").warning(
            "nerfacc has no CUDA ops here (no wheel with them, no nvcc): using the torch reference"
        )
    return found


def _choose(backend: str, *tensors: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"rendering backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    plain = all(x.dtype == torch.float32 for x in tensors)
    if backend == "auto":
        if tensors[0].is_cuda:
            return "nerfacc" if plain and nerfacc_has_cuda() else "reference"
        return "native" if plain and tensors[0].device.type == "cpu" and native.library() is not None else "reference"
    if backend == "native":
        native.require_library()
    if backend == "nerfacc" and not nerfacc_has_cuda():
        raise RuntimeError(
            "backend 'nerfacc' was asked for but has no CUDA ops: install a CUDA toolkit (nvcc), or nerfacc's own wheel"
        )
    if backend != "reference" and not plain:
        raise ValueError(f"backend {backend!r} takes float32 tensors, got {[x.dtype for x in tensors]}")
    return backend


# ---- torch reference


def _march_reference(
    rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, grid: Grid, steps: Steps, jitter: Tensor
) -> Samples:
    """Look up every step, some rays at a time; in float64 like the native march, to find the same cells."""
    centre, half = (grid.aabb[3:].double() + grid.aabb[:3]) / 2, (grid.aabb[3:].double() - grid.aabb[:3]) / 2
    # beyond `reach` no ray is in the grid
    reach = (rays_o - centre).norm(dim=1) + half.norm() * 2 ** (len(grid.occupancy) - 1)
    t_min, t_max = t_min.double(), torch.minimum(t_max.double(), reach)
    start = t_min + jitter * torch.clamp(t_min * steps.cone_angle, min=steps.size)
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
        t_starts.to(rays_o), t_ends.to(rays_o), ray_indices, _pack(torch.bincount(ray_indices, minlength=len(rays_o)))
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


def _composite_reference(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor
) -> Composite:
    alphas = -torch.expm1(-sigmas * (t_ends - t_starts))
    weights = transmittance(sigmas, t_starts, t_ends, packed_info) * alphas
    return _accumulate(weights, rgbs, t_starts, t_ends, packed_info)


def _accumulate(weights: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor) -> Composite:
    values = torch.cat([rgbs, (t_starts + t_ends)[:, None] / 2, torch.ones_like(weights)[:, None]], dim=1)
    sums = values.new_zeros(len(packed_info), 5)
    sums = sums.index_add(0, expand_rays(packed_info, len(weights)), weights[:, None] * values)
    return Composite(sums[:, :3], sums[:, 3], sums[:, 4], weights)


# ---- nerfacc on CUDA


def _march_nerfacc(
    rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, grid: Grid, steps: Steps, jitter: Tensor
) -> Samples:
    import nerfacc

    centre, half = (grid.aabb[3:] + grid.aabb[:3]) / 2, (grid.aabb[3:] - grid.aabb[:3]) / 2
    aabbs = torch.stack([torch.cat([centre - half * 2**l, centre + half * 2**l]) for l in range(len(grid.occupancy))])
    near = t_min + jitter * torch.clamp(t_min * steps.cone_angle, min=steps.size)
    intervals, samples, _ = nerfacc.traverse_grids(
        rays_o,
        rays_d,
        grid.occupancy,
        aabbs,
        near,
        t_max,
        steps.size,
        steps.cone_angle,
        traverse_steps_limit=steps.max_samples,
    )
    return Samples(
        intervals.vals[intervals.is_left], intervals.vals[intervals.is_right], samples.ray_indices, samples.packed_info
    )


def _composite_nerfacc(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor
) -> Composite:
    import nerfacc

    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, packed_info=packed_info)
    return _accumulate(weights, rgbs, t_starts, t_ends, packed_info)
