"""The ray loop: march, evaluate a field's density and stop where the light is gone, a few steps at a time, in C++.

What `rendering.march` and `rendering.transmittance` find together, without most of the samples behind a surface.
Symbols as in rendering.py and field.py. float32 on the CPU; bit-identical for any number of threads.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from custom_kernels import native
from custom_kernels.field import Encoded, Field, new_encoded
from custom_kernels.field_native import encoded_structure, structure
from custom_kernels.rendering import Grid, Samples, Steps


class Traced(NamedTuple):
    """The lit samples; which of them are `seen` [S] bool, of weight above early_stop; and the density pass over them.

    encoded.unit and encoded.features are empty unless they were asked for.
    """

    samples: Samples
    seen: Tensor
    encoded: Encoded


@torch.no_grad()
def trace(
    field: Field,
    rays: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grid: Grid,
    steps: Steps,
    early_stop: float,
    with_features: bool,
) -> Traced:
    """Samples that at least `early_stop` of the light reaches: a ray ends where less is left.

    rays: rays_o, rays_d [R, 3] (d of unit length), t_min, t_max, jitter [R], as in `march`.
    """
    rays = tuple(x.contiguous() for x in rays)
    count = len(rays[0])
    shape, held_rays = structure(field), _rays(rays, grid, steps, early_stop)
    counts = torch.empty(count, dtype=torch.int64)
    library, threads = native.require_library(), ctypes.c_int(native.num_threads())
    library.trace_rays.restype = ctypes.c_void_p
    held = library.trace_rays(
        ctypes.byref(shape), ctypes.byref(held_rays), int(with_features), native.pointer(counts), threads
    )
    packed = torch.stack([counts.cumsum(0) - counts, counts], dim=1)
    size = int(counts.sum())
    encoded = new_encoded(field, size)
    if not with_features:
        encoded = encoded._replace(unit=torch.empty(3, 0), features=torch.empty(field.levels, 0, 2))
    samples = Samples(torch.empty(size), torch.empty(size), torch.empty(size, dtype=torch.int64), packed)
    seen = torch.empty(size, dtype=torch.bool)
    found = _Found(*map(native.pointer, (packed, *samples[:3], seen)))
    library.trace_take.restype = None
    library.trace_take(ctypes.c_void_p(held), ctypes.byref(found), ctypes.byref(encoded_structure(encoded)))
    return Traced(samples, seen, encoded)


class _Rays(ctypes.Structure):
    """Mirrors Rays in cpu/trace.cpp."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("o", "d", "t_min", "t_max", "jitter", "occupied", "blocks")),
        *((name, ctypes.c_int32) for name in ("levels", "resolution")),
        ("aabb", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("step", "cone")),
        ("max_samples", ctypes.c_int64),
        ("early_stop", ctypes.c_float),
    )


class _Found(ctypes.Structure):
    """Mirrors Found in cpu/trace.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed", "starts", "ends", "ray_indices", "seen"))


def _rays(rays: tuple[Tensor, ...], grid: Grid, steps: Steps, early_stop: float) -> _Rays:
    cells, blocks, aabb = grid.occupancy.contiguous(), grid.blocks.contiguous(), grid.aabb.float().contiguous()
    pointers = map(native.pointer, (*rays, cells, blocks))
    ends = native.pointer(aabb), steps.size, steps.cone_angle, steps.max_samples, early_stop
    found = _Rays(len(rays[0]), *pointers, *cells.shape[:2], *ends)
    found.kept = cells, blocks, aabb, rays
    return found
