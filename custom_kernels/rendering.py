"""Volume rendering of packed samples: `march` finds the samples in occupied cells, `composite` renders them.

Symbols, here and in cpu/rendering.cpp: R rays, S samples; a ray is o + t d, t in world units where d is of unit length.
A sample is the interval [t_start, t_end]; packed_info [R, 2] int64 holds each ray's (first sample, number of samples),
rays in order and samples front to back.

Backends: `reference` (torch, any device and dtype), `native` (C++, float32 on the CPU; bit-identical for any number of
threads), `triton` (float32 on CUDA, deterministic), `nerfacc` (its CUDA ops, float32 on CUDA; where they do not
compile, what `auto` takes). `auto` is native on the CPU, triton on CUDA, and the reference where these do not run.
"""

import torch
from torch import Tensor

from custom_kernels import native
from custom_kernels.libraries import NERFACC, TRITON
from custom_kernels.rendering_native import composite_native, march_native
from custom_kernels.rendering_reference import (
    Composite,
    Grid,
    Samples,
    Steps,
    composite_reference,
    ends,
    exclusive_sum,
    expand_rays,
    march_reference,
    pack,
    transmittance,
)
from custom_kernels.trials import require, runs

__all__ = [
    "Composite", "Grid", "Samples", "Steps", "composite", "exclusive_sum", "expand_rays", "keep", "march",
    "transmittance",
]  # fmt: skip

BACKENDS = ("auto", "reference", "native", "triton", "nerfacc")


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
    return march_by(
        choose_backend(backend, rays_o, t_min, t_max, jitter), rays_o, rays_d, t_min, t_max, grid, steps, jitter
    )


def march_by(
    chosen: str, rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, grid: Grid, steps: Steps, jitter: Tensor
) -> Samples:
    """`march` by a backend that is known to run and to take these tensors."""
    if chosen == "native":
        args = [
            x.contiguous()
            for x in (rays_o, rays_d, t_min, t_max, jitter, grid.occupancy, grid.blocks, grid.aabb.float())
        ]
        return Samples(*march_native(*args, steps.size, steps.cone_angle, steps.max_samples))
    rays_o, rays_d, t_min, t_max, jitter = _finite(rays_o, rays_d, t_min, t_max, jitter)
    if chosen == "nerfacc":
        from custom_kernels.rendering_nerfacc import march_nerfacc

        return march_nerfacc(rays_o, rays_d, t_min, t_max, grid, steps, jitter)
    start, stop = ends(rays_o, t_min, t_max, grid, steps, jitter)
    if chosen == "triton":
        from custom_kernels.rendering_triton import march_triton

        shape = grid.occupancy, grid.blocks, grid.aabb
        return Samples(
            *march_triton(rays_o, rays_d, start, stop, *shape, (steps.size, steps.cone_angle, steps.max_samples))
        )
    return march_reference(rays_o, rays_d, start, stop, grid, steps)


def _finite(rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, jitter: Tensor) -> list[Tensor]:
    """Replace rays that are not finite by ones that end before they begin: a GPU may hang on the former."""
    finite = (rays_o.isfinite() & rays_d.isfinite()).all(1) & t_min.isfinite() & jitter.isfinite()
    finite &= ~t_max.isnan()  # but it may be infinite
    harmless = ((rays_o, 0.0), (rays_d, 1.0), (t_min, 0.0), (t_max, -1.0), (jitter, 0.0))
    return [torch.where(finite[:, None] if x.dim() == 2 else finite, x, value) for x, value in harmless]


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
    chosen = choose_backend(
        "reference" if backend == "auto" and lengths_need_grad else backend, sigmas, rgbs, t_starts, t_ends
    )
    inputs = sigmas, rgbs, t_starts, t_ends, packed_info
    if chosen == "reference":
        return composite_reference(*inputs)
    if chosen == "nerfacc":
        from custom_kernels.rendering_nerfacc import composite_nerfacc

        return composite_nerfacc(*inputs)
    if lengths_need_grad:
        raise ValueError(f"backend {chosen!r} has no gradient for t_starts and t_ends: use backend 'reference'")
    if chosen == "triton":
        from custom_kernels.rendering_triton import composite_triton

        return Composite(*composite_triton(*inputs))
    return Composite(*composite_native(*inputs)[:4])


def keep(samples: Samples, mask: Tensor) -> Samples:
    """The samples where mask [S] is true, packed again."""
    t_starts, t_ends, ray_indices = (x[mask] for x in samples[:3])
    return Samples(t_starts, t_ends, ray_indices, pack(torch.bincount(ray_indices, minlength=len(samples.packed_info))))


# ---- choice of backend


def choose_backend(backend: str, *tensors: Tensor) -> str:
    """The backend for these tensors: `auto` resolved, a named one checked (RuntimeError if it cannot run)."""
    if backend not in BACKENDS:
        raise ValueError(f"rendering backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return _fastest(tensors[0]) if all(x.dtype == torch.float32 for x in tensors) else "reference"
    if backend == "native":
        native.require(*tensors)
    if backend == "triton":
        require(TRITON, *tensors)
    if backend == "nerfacc":
        require(NERFACC, *tensors, tried=False)
        # its sources are of 2023 and compile with few versions of torch; a job should not end for that
        return backend if runs(NERFACC) else _fastest(tensors[0])
    return backend


def _fastest(tensor: Tensor) -> str:
    if tensor.is_cuda:
        return "triton" if not torch.compiler.is_compiling() and runs(TRITON) else "reference"
    return "native" if tensor.device.type == "cpu" and native.library() is not None else "reference"
