"""Triton kernels of compositing; custom_kernels/rendering.py states what they compute and has the torch reference.

A program takes one ray, BLOCK samples at a time; sums along the ray have a fixed order, so results are deterministic.
"""

import triton
import triton.language as tl

THICKEST = tl.constexpr(100.0)  # exp(-100) is 0 in float32; keeps running sums finite


@triton.jit
def absorbed(x):
    """1 - exp(-x) for x >= 0, without cancellation where x is small: its series to x^6 below 0.25."""
    series = x * (1.0 - x / 2 * (1.0 - x / 3 * (1.0 - x / 4 * (1.0 - x / 5 * (1.0 - x / 6)))))
    return tl.where(x < 0.25, series, 1.0 - tl.exp(-x))


@triton.jit
def forward(
    sigmas, rgbs, t_starts, t_ends, packed, rgb, depth, opacity, weights, behind, BLOCK: tl.constexpr
):  # fmt: skip
    """rgb [R, 3], depth, opacity [R], weights [S], and the light left behind each sample [S]."""
    ray = tl.program_id(0).to(tl.int64)
    first, count = tl.load(packed + 2 * ray), tl.load(packed + 2 * ray + 1)
    passed = 0.0  # thickness of the samples of earlier blocks
    red, green, blue, far, total = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        live = k < count
        k = first + k
        a, b = tl.load(t_starts + k, mask=live, other=0.0), tl.load(t_ends + k, mask=live, other=0.0)
        own = tl.load(sigmas + k, mask=live, other=0.0) * (b - a)
        thickness = tl.where(own > THICKEST, THICKEST, own)  # NaN stays
        until = passed + tl.cumsum(thickness, axis=0)
        weight = tl.exp(thickness - until) * absorbed(own)
        tl.store(weights + k, weight, mask=live)
        tl.store(behind + k, tl.exp(-until), mask=live)
        red += tl.sum(weight * tl.load(rgbs + 3 * k, mask=live, other=0.0), axis=0)
        green += tl.sum(weight * tl.load(rgbs + 3 * k + 1, mask=live, other=0.0), axis=0)
        blue += tl.sum(weight * tl.load(rgbs + 3 * k + 2, mask=live, other=0.0), axis=0)
        far += tl.sum(weight * 0.5 * (a + b), axis=0)
        total += tl.sum(weight, axis=0)
        passed += tl.sum(thickness, axis=0)
    tl.store(rgb + 3 * ray, red)
    tl.store(rgb + 3 * ray + 1, green)
    tl.store(rgb + 3 * ray + 2, blue)
    tl.store(depth + ray, far)
    tl.store(opacity + ray, total)


@triton.jit
def backward(
    rgbs, t_starts, t_ends, packed, weights, behind, g_rgb, g_depth, g_opacity, g_weights, g_sigmas, g_rgbs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With g_k = dL/dw_k:  dL/dsigma_k = dt_k (T_{k+1} g_k − Σ_{j>k} w_j g_j),  dL/drgb_k = w_k dL/drgb.

    From back to front, because the sum over later samples would lose its digits as a difference.
    """
    ray = tl.program_id(0).to(tl.int64)
    first, count = tl.load(packed + 2 * ray), tl.load(packed + 2 * ray + 1)
    red, green, blue = tl.load(g_rgb + 3 * ray), tl.load(g_rgb + 3 * ray + 1), tl.load(g_rgb + 3 * ray + 2)
    far, total = tl.load(g_depth + ray), tl.load(g_opacity + ray)
    later = 0.0  # Σ w g of the samples of later blocks
    blocks = (count + BLOCK - 1) // BLOCK
    for done in range(0, blocks):
        k = (blocks - 1 - done) * BLOCK + tl.arange(0, BLOCK)
        live = k < count
        k = first + k
        a, b = tl.load(t_starts + k, mask=live, other=0.0), tl.load(t_ends + k, mask=live, other=0.0)
        weight = tl.load(weights + k, mask=live, other=0.0)
        g = tl.load(g_weights + k, mask=live, other=0.0) + total + far * 0.5 * (a + b)
        g += red * tl.load(rgbs + 3 * k, mask=live, other=0.0)
        g += green * tl.load(rgbs + 3 * k + 1, mask=live, other=0.0)
        g += blue * tl.load(rgbs + 3 * k + 2, mask=live, other=0.0)
        share = weight * g  # 0 past the ray's end
        after = later + tl.cumsum(share, axis=0, reverse=True) - share
        left = tl.load(behind + k, mask=live, other=0.0)
        tl.store(g_sigmas + k, (b - a) * (left * g - after), mask=live)
        tl.store(g_rgbs + 3 * k, weight * red, mask=live)
        tl.store(g_rgbs + 3 * k + 1, weight * green, mask=live)
        tl.store(g_rgbs + 3 * k + 2, weight * blue, mask=live)
        later += tl.sum(share, axis=0)
