"""Triton kernel of the march; custom_kernels/rendering.py states what it finds and has the torch reference.

One ray a lane. Everything is computed in float64, as in cpu/march.h, so that the same cells are found. Coordinates are
those of the grid: level l covers [−2^l, 2^l]³. `space` is float64 [9]: centre and half extent of the box, the steps'
size, its inverse, the cone angle.
"""

import triton
import triton.language as tl

EARLY = tl.constexpr(1e-6)  # walls are moved early by this part of a step: a cell may be checked twice, never skipped
STRIDES = tl.constexpr(8)  # most steps by which a ray passes an empty cell at once, where steps grow


@triton.jit
def load_axis(rays_o, rays_d, space, ray, live, AXIS: tl.constexpr):
    """Origin and direction along an axis, and 1 / direction (1 where the direction is 0)."""
    half = tl.load(space + 3 + AXIS)
    o = (tl.load(rays_o + ray * 3 + AXIS, mask=live, other=0.0).to(tl.float64) - tl.load(space + AXIS)) / half
    d = tl.load(rays_d + ray * 3 + AXIS, mask=live, other=0.0).to(tl.float64) / half
    return o, d, 1.0 / tl.where(d == 0.0, 1.0, d)


@triton.jit
def clip(o, d, inverse, enter, leave, REACH: tl.constexpr):
    """Shorten [enter, leave] to where the ray is in the outermost level along an axis."""
    near, far = (-REACH - o) * inverse, (REACH - o) * inverse
    outside = (d == 0.0) & (tl.abs(o) > REACH)
    enter = tl.where(d == 0.0, enter, tl.maximum(enter, tl.minimum(near, far)))
    leave = tl.where(d == 0.0, leave, tl.minimum(leave, tl.maximum(near, far)))
    return enter, tl.where(outside, float("-inf"), leave)


@triton.jit
def index_of(p, inverse_scale, inside, resolution):
    """Cell of coordinates p of a level along an axis; 0 outside."""
    scaled = (tl.where(inside, p, 0.0) * inverse_scale + 1.0) * 0.5 * resolution
    return tl.minimum(scaled.to(tl.int32), resolution - 1)


@triton.jit
def wall_at(o, d, inverse, index, full, scale, cell):
    """Where the ray leaves the cell, or the empty block of 4³ cells, along an axis."""
    low = tl.where(full, index, index & -4)
    width = tl.where(full, 1, 4)
    wall = (tl.where(d > 0.0, low + width, low) * cell - 1.0) * scale
    return tl.where(d == 0.0, float("inf"), (wall - o) * inverse)


@triton.jit
def find_level(extent, LEVELS: tl.constexpr):
    """The finest level that covers a point, its half extent and the inverse of that."""
    level = tl.where(extent > 1.0, 0, 0)
    scale = tl.where(extent > 1.0, 1.0, 1.0).to(tl.float64)
    for coarser in tl.static_range(LEVELS - 1):
        beyond = extent > 2.0**coarser
        level = tl.where(beyond, coarser + 1, level)
        scale = tl.where(beyond, 2.0 ** (coarser + 1), scale)
    return level, scale


@triton.jit
def pass_by(t, dt, target, size, inverse_size, cone, CONE: tl.constexpr):
    """The first step, after at least one, whose midpoint is not before `target`; an earlier one where steps grow."""
    if CONE:
        following = t + dt
        for _ in tl.static_range(STRIDES - 1):
            further = tl.maximum(cone * following, size)
            following = tl.where(following + 0.5 * further < target, following + further, following)
        return following
    else:
        return t + tl.maximum(tl.ceil((target - t) * inverse_size - 0.5), 1.0) * size


@triton.jit(do_not_specialize=["rays", "resolution"])
def march(
    rays_o, rays_d, starts, ends, limits, occupancy, blocks, space, firsts, counts, t_starts, t_ends, ray_indices,
    rays, resolution, LEVELS: tl.constexpr, CONE: tl.constexpr, FILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walk along rays, from `starts` to `ends` (float64 [R]), until each has `limits` (int64 [R]) samples.

    Without FILL: write the number of samples to counts, and where the first starts to firsts. With FILL: `starts` are
    these; counts has the place of each ray's first sample; write the samples.
    """
    ray = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = ray < rays
    ox, dx, ix = load_axis(rays_o, rays_d, space, ray, live, 0)
    oy, dy, iy = load_axis(rays_o, rays_d, space, ray, live, 1)
    oz, dz, iz = load_axis(rays_o, rays_d, space, ray, live, 2)
    size, inverse_size, cone = tl.load(space + 6), tl.load(space + 7), tl.load(space + 8)
    t = tl.load(starts + ray, mask=live, other=0.0)
    t_max = tl.load(ends + ray, mask=live, other=float("-inf"))
    limit = tl.load(limits + ray, mask=live, other=0)
    enter = tl.where(live, float("-inf"), float("-inf")).to(tl.float64)
    enter, t_max = clip(ox, dx, ix, enter, t_max, 2.0 ** (LEVELS - 1))
    enter, t_max = clip(oy, dy, iy, enter, t_max, 2.0 ** (LEVELS - 1))
    enter, t_max = clip(oz, dz, iz, enter, t_max, 2.0 ** (LEVELS - 1))
    place = tl.zeros([BLOCK], dtype=tl.int64)
    if FILL:
        place = tl.load(counts + ray, mask=live, other=0)
    found = tl.zeros([BLOCK], dtype=tl.int64)
    first = tl.zeros([BLOCK], dtype=tl.float64)
    cell, wide, many = 2.0 / resolution.to(tl.float64), resolution.to(tl.int64), (resolution.to(tl.int64) + 3) // 4
    dt = tl.maximum(cone * t, size)
    active = (found < limit) & (t + 0.5 * dt < t_max)  # NaN: not active
    while tl.max(active.to(tl.int32), axis=0) > 0:
        middle = t + 0.5 * dt
        px, py, pz = ox + dx * middle, oy + dy * middle, oz + dz * middle
        extent = tl.maximum(tl.maximum(tl.abs(px), tl.abs(py)), tl.abs(pz))
        level, scale = find_level(extent, LEVELS)
        inside = extent <= scale
        inverse_scale = 1.0 / scale
        x = index_of(px, inverse_scale, inside, resolution)
        y = index_of(py, inverse_scale, inside, resolution)
        z = index_of(pz, inverse_scale, inside, resolution)
        block = ((level.to(tl.int64) * many + x // 4) * many + y // 4) * many + z // 4
        full = tl.load(blocks + block, mask=active & inside, other=0) != 0
        index = ((level.to(tl.int64) * wide + x) * wide + y) * wide + z
        hit = tl.load(occupancy + index, mask=active & inside & full, other=0) != 0
        if FILL:
            tl.store(t_starts + place + found, t.to(tl.float32), mask=hit)
            tl.store(t_ends + place + found, (t + dt).to(tl.float32), mask=hit)
            tl.store(ray_indices + place + found, ray, mask=hit)
        first = tl.where(hit & (found == 0), t, first)
        found += hit.to(tl.int64)
        leave = tl.minimum(wall_at(ox, dx, ix, x, full, scale, cell), wall_at(oy, dy, iy, y, full, scale, cell))
        leave = tl.minimum(leave, wall_at(oz, dz, iz, z, full, scale, cell))
        target = tl.where(inside, leave, enter) - EARLY * size
        following = tl.where(hit, t + dt, pass_by(t, dt, target, size, inverse_size, cone, CONE))
        dt = tl.maximum(cone * following, size)
        # a ray whose steps vanish beside t would never end
        active = active & (following > t) & (following + 0.5 * dt < t_max) & (found < limit)
        t = following
    if not FILL:
        tl.store(counts + ray, found, mask=live)
        tl.store(firsts + ray, first, mask=live)
