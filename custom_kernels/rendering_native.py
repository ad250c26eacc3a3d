"""The C++ kernels of rendering.py as torch ops; shapes and meaning are described there."""

import torch
from torch import Tensor

from custom_kernels import native


@torch.library.custom_op("custom_kernels::march", mutates_args=(), device_types="cpu")
def march_native(
    rays_o: Tensor, rays_d: Tensor, t_min: Tensor, t_max: Tensor, jitter: Tensor,
    occupancy: Tensor, blocks: Tensor, aabb: Tensor, step: float, cone_angle: float, max_samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`march` in C++, in two passes, count and fill; tensors contiguous. Returns the fields of Samples."""
    lib, p, c = native.require_library(), native.pointer, native.ctypes
    rays, threads = c.c_int64(len(rays_o)), c.c_int(native.num_threads())
    levels, resolution = (c.c_int(size) for size in occupancy.shape[:2])
    space = (p(occupancy), p(blocks), levels, resolution, p(aabb), c.c_double(step), c.c_double(cone_angle))
    counts, first = torch.empty(len(rays_o), dtype=torch.int64), torch.empty(len(rays_o), dtype=torch.float64)
    origin = p(rays_o), p(rays_d)
    ends = p(t_min), p(t_max), p(jitter), rays
    lib.march_count(*origin, *ends, *space, c.c_int64(max_samples), p(counts), p(first), threads)
    packed = torch.stack([counts.cumsum(0) - counts, counts], dim=1)
    size = int(counts.sum())
    t_starts, t_ends, ray_indices = torch.empty(size), torch.empty(size), torch.empty(size, dtype=torch.int64)
    out = p(packed), p(first), p(t_starts), p(t_ends), p(ray_indices)
    lib.march_fill(*origin, p(t_max), rays, *space, *out, threads)
    return t_starts, t_ends, ray_indices, packed


@march_native.register_fake
def _(rays_o, rays_d, t_min, t_max, jitter, occupancy, blocks, aabb, step, cone_angle, max_samples):
    size = torch.library.get_ctx().new_dynamic_size()
    new = rays_o.new_empty
    return new(size), new(size), new(size, dtype=torch.int64), new((len(rays_o), 2), dtype=torch.int64)


@torch.library.custom_op("custom_kernels::composite", mutates_args=(), device_types="cpu")
def composite_native(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`composite` in C++: the fields of Composite, then the transmittance behind each sample [S], without gradient."""
    rays, p, c = len(packed_info), native.pointer, native.ctypes
    ins = [x.contiguous() for x in (sigmas, rgbs, t_starts, t_ends, packed_info)]
    outs = [torch.empty(shape) for shape in ((rays, 3), rays, rays, len(sigmas), len(sigmas))]
    native.require_library().composite_forward(
        *map(p, ins), c.c_int64(rays), *map(p, outs), c.c_int(native.num_threads())
    )
    return tuple(outs)


@composite_native.register_fake
def _(sigmas, rgbs, t_starts, t_ends, packed_info):
    rays = len(packed_info)
    return tuple(sigmas.new_empty(shape) for shape in ((rays, 3), (rays,), (rays,), sigmas.shape, sigmas.shape))


@torch.library.custom_op("custom_kernels::composite_backward", mutates_args=(), device_types="cpu")
def composite_backward_native(
    rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor, weights: Tensor, transmittance: Tensor,
    g_rgb: Tensor, g_depth: Tensor, g_opacity: Tensor, g_weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of sigmas [S] and rgbs [S, 3] from those of the fields of Composite."""
    p, c = native.pointer, native.ctypes
    ins = [x.contiguous() for x in (rgbs, t_starts, t_ends, packed_info)]
    more = [x.contiguous() for x in (weights, transmittance, g_rgb, g_depth, g_opacity, g_weights)]
    g_sigmas, g_rgbs = torch.empty_like(weights), torch.empty(len(weights), 3)
    native.require_library().composite_backward(
        *map(p, ins), c.c_int64(len(packed_info)), *map(p, more), p(g_sigmas), p(g_rgbs), c.c_int(native.num_threads())
    )
    return g_sigmas, g_rgbs


@composite_backward_native.register_fake
def _(rgbs, t_starts, t_ends, packed_info, weights, transmittance, g_rgb, g_depth, g_opacity, g_weights):
    return weights.new_empty(weights.shape), rgbs.new_empty(rgbs.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:], output[3], output[4])
    ctx.mark_non_differentiable(output[4])


def _backward(ctx, g_rgb, g_depth, g_opacity, g_weights, _):
    g_sigmas, g_rgbs = composite_backward_native(*ctx.saved_tensors, g_rgb, g_depth, g_opacity, g_weights)
    return g_sigmas, g_rgbs, None, None, None


composite_native.register_autograd(_backward, setup_context=_save_for_backward)
