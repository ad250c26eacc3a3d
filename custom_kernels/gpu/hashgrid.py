"""Triton kernels of the hash encoding; custom_kernels/hashgrid.py states what they compute and has the torch reference.

A program takes BLOCK points, and one level where levels are independent. Levels are described by arrays [L]: offsets
int64 (first entry), scales float32 (cells along an axis), vertices int32 (along an axis), sizes int32 (entries), hashed
int32 (0 or 1). Arithmetic is in float32 and cells are found by fused multiply-add, as in cpu/hashgrid.h.
"""

import triton
import triton.language as tl


@triton.jit
def locate(x, scale):
    """Cell and fraction of x scale + 0.5 along an axis, for x clamped to [0, 1]; NaN gets some cell, fraction NaN."""
    inside = tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))
    whole = tl.fma(tl.where(inside == inside, inside, 0.0), scale, 0.5).to(tl.int32)
    # rounding position * scale by itself would lose the low bits of the fraction on fine levels
    rest = tl.fma(inside, scale, 0.5 - whole.to(tl.float32))
    overshot = rest < 0.0  # the first sum was rounded up to a whole number
    return tl.where(overshot, whole - 1, whole), tl.where(overshot, rest + 1.0, rest)


@triton.jit
def load_points(positions, point, live):
    """The three coordinates of points [BLOCK]."""
    x = tl.load(positions + point * 3, mask=live, other=0.0)
    y = tl.load(positions + point * 3 + 1, mask=live, other=0.0)
    z = tl.load(positions + point * 3 + 2, mask=live, other=0.0)
    return x, y, z


@triton.jit
def load_level(offsets, scales, vertices, sizes, hashed, level):
    """The numbers of one level."""
    size, side = tl.load(sizes + level).to(tl.uint32), tl.load(vertices + level).to(tl.uint32)
    return tl.load(offsets + level), tl.load(scales + level), side, size, tl.load(hashed + level)


@triton.jit
def entry_at(x, y, z, side, size, hashed, CORNER: tl.constexpr):
    """Entry, within its level, of a corner of cells; the bits of CORNER are x, y, z from the lowest."""
    ux = (x + (CORNER & 1)).to(tl.uint32)
    uy = (y + (CORNER >> 1 & 1)).to(tl.uint32)
    uz = (z + (CORNER >> 2)).to(tl.uint32)
    dense = ux + uy * side + uz * side * side
    dense = tl.where(dense >= size, dense - size, dense)  # a position at 1 reaches one row past the end
    mixed = (ux ^ (uy * 2654435761) ^ (uz * 805459861)) & (size - 1)
    return tl.where(hashed != 0, mixed, dense).to(tl.int64)


@triton.jit
def share(fraction, FAR: tl.constexpr):
    """Weight of the near or far side along an axis."""
    if FAR:
        return fraction
    else:
        return 1.0 - fraction


@triton.jit(do_not_specialize=["count"])
def encode(
    positions, table, offsets, scales, vertices, sizes, hashed, out, count, FEATURES: tl.constexpr, BLOCK: tl.constexpr
):
    """Features of all levels, out [S, L·F]. A feature at a time: arrays [BLOCK, F] would go through shared memory."""
    level, levels = tl.program_id(1), tl.num_programs(1)
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = point < count
    offset, scale, side, size, is_hashed = load_level(offsets, scales, vertices, sizes, hashed, level)
    x, y, z = load_points(positions, point, live)
    cx, fx = locate(x, scale)
    cy, fy = locate(y, scale)
    cz, fz = locate(z, scale)
    row = point * (levels * FEATURES) + level * FEATURES
    for feature in tl.static_range(FEATURES):
        value = tl.zeros([BLOCK], dtype=tl.float32)
        for corner in tl.static_range(8):
            entry = offset + entry_at(cx, cy, cz, side, size, is_hashed, corner)
            weight = share(fx, corner & 1) * share(fy, corner >> 1 & 1) * share(fz, corner >> 2)
            value += weight * tl.load(table + entry * FEATURES + feature, mask=live, other=0.0)
        tl.store(out + row + feature, value, mask=live)


@triton.jit(do_not_specialize=["count"])
def table_gradient(
    positions, gradient, offsets, scales, vertices, sizes, hashed, out, count,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add weight · gradient [S, L·F] to the corners' entries of out [T, F], atomically: the order is not fixed."""
    level, levels = tl.program_id(1), tl.num_programs(1)
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = point < count
    offset, scale, side, size, is_hashed = load_level(offsets, scales, vertices, sizes, hashed, level)
    x, y, z = load_points(positions, point, live)
    cx, fx = locate(x, scale)
    cy, fy = locate(y, scale)
    cz, fz = locate(z, scale)
    row = point * (levels * FEATURES) + level * FEATURES
    for feature in tl.static_range(FEATURES):
        slope = tl.load(gradient + row + feature, mask=live, other=0.0)
        for corner in tl.static_range(8):
            entry = offset + entry_at(cx, cy, cz, side, size, is_hashed, corner)
            weight = share(fx, corner & 1) * share(fy, corner >> 1 & 1) * share(fz, corner >> 2)
            tl.atomic_add(out + entry * FEATURES + feature, weight * slope, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["count", "levels"])
def positions_gradient(
    positions, table, gradient, offsets, scales, vertices, sizes, hashed, out, count, levels,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the positions, out [S, 3]; 0 outside [0, 1]. A program sums all levels of its points."""
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = point < count
    x, y, z = load_points(positions, point, live)
    gx = tl.zeros([BLOCK], dtype=tl.float32)
    gy = tl.zeros([BLOCK], dtype=tl.float32)
    gz = tl.zeros([BLOCK], dtype=tl.float32)
    for level in range(levels):
        offset, scale, side, size, is_hashed = load_level(offsets, scales, vertices, sizes, hashed, level)
        cx, fx = locate(x, scale)
        cy, fy = locate(y, scale)
        cz, fz = locate(z, scale)
        row = point * (levels * FEATURES) + level * FEATURES
        for corner in tl.static_range(8):
            entry = offset + entry_at(cx, cy, cz, side, size, is_hashed, corner)
            value = tl.zeros([BLOCK], dtype=tl.float32)
            for feature in tl.static_range(FEATURES):
                slope = tl.load(gradient + row + feature, mask=live, other=0.0)
                value += slope * tl.load(table + entry * FEATURES + feature, mask=live, other=0.0)
            value *= scale
            wx, wy, wz = share(fx, corner & 1), share(fy, corner >> 1 & 1), share(fz, corner >> 2)
            gx += (2 * (corner & 1) - 1) * wy * wz * value
            gy += (2 * (corner >> 1 & 1) - 1) * wx * wz * value
            gz += (2 * (corner >> 2) - 1) * wx * wy * value
    tl.store(out + point * 3, tl.where((x < 0.0) | (x > 1.0), 0.0, gx), mask=live)
    tl.store(out + point * 3 + 1, tl.where((y < 0.0) | (y > 1.0), 0.0, gy), mask=live)
    tl.store(out + point * 3 + 2, tl.where((z < 0.0) | (z > 1.0), 0.0, gz), mask=live)
