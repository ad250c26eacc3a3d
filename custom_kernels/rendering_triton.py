"""Marching and compositing by the kernels in gpu/, as torch functions; shapes and meaning are in rendering.py."""

import functools

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from custom_kernels.gpu import composite as compositing
from custom_kernels.gpu import march as marching
from custom_kernels.trials import device_of

RAYS = 32  # rays of a program of the march, one a lane of a warp
SAMPLES = 32  # samples that a program of compositing takes at once


def march_triton(
    rays_o: Tensor, rays_d: Tensor, starts: Tensor, ends: Tensor,
    occupancy: Tensor, blocks: Tensor, aabb: Tensor, steps: tuple[float, float, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`march` in two passes, count and fill. starts, ends float64 [R]; every ray is finite. Returns Samples' fields.

    steps: size, cone angle, most samples of a ray. The host waits for the device once, for the number of samples.
    """
    size, cone, most = steps
    box = aabb.double()
    numbers = torch.cat(
        [(box[3:] + box[:3]) / 2, (box[3:] - box[:3]) / 2, _on_device((size, 1 / size, cone), box.device)]
    )
    space = rays_o.contiguous(), rays_d.contiguous(), occupancy.contiguous().view(torch.uint8), blocks, numbers
    limits = torch.full_like(starts, most, dtype=torch.int64)
    counts, firsts = torch.empty_like(limits), torch.empty_like(starts)
    _march(space, (starts.contiguous(), ends.contiguous(), limits), (firsts, counts), None, cone > 0)
    packed = torch.stack([counts.cumsum(0) - counts, counts], dim=1)
    total = int(counts.sum())
    t_starts, t_ends = rays_o.new_empty(2, total)
    ray_indices = torch.empty(total, dtype=torch.int64, device=rays_o.device)
    if total:
        places = firsts, packed[:, 0].contiguous()
        _march(space, (firsts, ends.contiguous(), counts), places, (t_starts, t_ends, ray_indices), cone > 0)
    return t_starts, t_ends, ray_indices, packed


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as float64 on the device, copied there once: a copy makes the host wait."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _march(
    space: tuple[Tensor, ...], ends: tuple[Tensor, ...], places: tuple[Tensor, Tensor],
    samples: tuple[Tensor, ...] | None, grows: bool,
) -> None:  # fmt: skip
    """One pass: count the samples, or write them."""
    rays_o, rays_d, occupancy, blocks, numbers = space
    if not len(rays_o):
        return
    grid = (triton.cdiv(len(rays_o), RAYS),)
    given = *ends, occupancy, blocks.contiguous().view(torch.uint8), numbers, *places
    filled = samples is not None
    out = samples if filled else (rays_o, rays_o, places[1])  # not written without FILL
    options = {"LEVELS": len(occupancy), "CONE": grows, "FILL": filled, "BLOCK": RAYS, "num_warps": 1}
    with device_of(rays_o):
        marching.march[grid](rays_o, rays_d, *given, *out, len(rays_o), occupancy.shape[1], **options)


def composite_triton(
    sigmas: Tensor, rgbs: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`composite`: the fields of Composite, differentiable once in sigmas and rgbs."""
    return _Composite.apply(sigmas, rgbs, t_starts, t_ends, packed_info)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        sigmas, rgbs, t_starts, t_ends, packed = (x.contiguous() for x in inputs)
        count, rays = len(sigmas), len(packed)
        outs = [sigmas.new_empty(shape) for shape in ((rays, 3), rays, rays, count, count)]
        if rays:
            with device_of(sigmas):
                given = sigmas, rgbs, t_starts, t_ends, packed
                compositing.forward[(rays,)](*given, *outs, BLOCK=SAMPLES, num_warps=1)
        ctx.save_for_backward(rgbs, t_starts, t_ends, packed, *outs[3:])
        return tuple(outs[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        g_sigmas, g_rgbs = torch.empty_like(saved[4]), torch.empty_like(saved[0])
        if len(saved[3]):
            with device_of(saved[0]):
                given = *saved, *(g.contiguous() for g in gradients)
                compositing.backward[(len(saved[3]),)](*given, g_sigmas, g_rgbs, BLOCK=SAMPLES, num_warps=1)
        return g_sigmas, g_rgbs, None, None, None
