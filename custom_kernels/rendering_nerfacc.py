"""Marching and compositing by nerfacc's CUDA ops; shapes and meaning are in rendering.py."""

import nerfacc
import torch
from torch import Tensor

from custom_kernels.rendering_reference import Composite, Grid, Samples, Steps, accumulate


def march_nerfacc(
    rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, grid: Grid, steps: Steps, jitter: Tensor
) -> Samples:
    """`march`; every ray is finite, or it would not end."""
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


def composite_nerfacc(sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor) -> Composite:
    """`composite`."""
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, packed_info=packed_info)
    return accumulate(weights, rgbs, t_starts, t_ends, packed_info)
