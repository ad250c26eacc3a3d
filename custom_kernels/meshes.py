"""Triangles on a grid of pixels: which pixels they cover, and a z-buffer.

Symbols: F triangles; corners [F, 3, 2] are (x, y) in pixels, the centre of pixel (row r, column c) is (c + ½, r + ½).
"""

from collections.abc import Iterator

import numpy as np

from custom_kernels import native

CANDIDATES = 1 << 21  # triangle × pixel tests at a time


def rasterise(corners: np.ndarray, width: int, height: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the pixels whose centres are in triangles `[F, 3, 2]` (x, y), in chunks of (y·W + x, face, barycentrics).

    A centre on an edge belongs to both neighbours. Always yields at least one chunk.
    """
    low = np.clip(np.ceil(corners.min(1) - 0.5), 0, [width, height]).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) - 0.5) + 1, 0, [width, height]).astype(np.int64)
    extent = np.maximum(high - low, 0)
    count = extent.prod(1)
    block = np.cumsum(count) // CANDIDATES
    for part in np.split(np.arange(len(corners)), np.flatnonzero(np.diff(block)) + 1):
        face = np.repeat(part, count[part])
        rank = np.arange(len(face)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        x = low[face, 0] + rank % np.maximum(extent[face, 0], 1)
        y = low[face, 1] + rank // np.maximum(extent[face, 0], 1)
        bary = _barycentric(corners[face], np.stack([x, y], 1) + 0.5)
        inside = (bary >= -1e-9).all(1)
        yield (y * width + x)[inside], face[inside], bary[inside]


def _barycentric(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Barycentric coordinates `[N, 3]` of points `[N, 2]` in triangles `[N, 3, 2]`; all negative in degenerate ones."""
    a, e1, e2 = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    p = points - a
    area = e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]
    safe = np.where(area == 0, np.inf, area)
    v = (p[:, 0] * e2[:, 1] - p[:, 1] * e2[:, 0]) / safe
    w = (e1[:, 0] * p[:, 1] - e1[:, 1] * p[:, 0]) / safe
    return np.where(area[:, None] == 0, -1.0, np.stack([1.0 - v - w, v, w], 1))


def z_buffer(
    corners: np.ndarray, inverse: np.ndarray, uv: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return inverse depth `[H·W]` (0: none) and uv `[H·W, 2]` of the nearest surface at each pixel.

    corners `[F, 3, 2]`, inverse depth `[F, 3]`, uv `[F, 3, 2]`. In C++ where it is built, else `z_buffer_reference`.
    """
    library = native.library()
    if library is None:
        return z_buffer_reference(corners, inverse, uv, width, height)
    c = native.ctypes
    ins = [np.ascontiguousarray(x, np.float64) for x in (corners, inverse, uv)]
    nearest, found = np.zeros(height * width), np.zeros((height * width, 2))
    library.z_buffer(
        *(c.c_void_p(x.ctypes.data) for x in ins), *map(c.c_int64, (len(corners), width, height)),
        *(c.c_void_p(x.ctypes.data) for x in (nearest, found)), c.c_int(native.num_threads()),
    )  # fmt: skip
    return nearest, found


def z_buffer_reference(
    corners: np.ndarray, inverse: np.ndarray, uv: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """`z_buffer` in numpy."""
    nearest, found = np.zeros(height * width), np.zeros((height * width, 2))
    for pixel, face, bary in rasterise(corners, width, height):
        weight = bary * inverse[face]  # attributes / depth are linear on the screen
        near = weight.sum(1)
        order = np.argsort(near, kind="stable")
        order = order[near[order] > nearest[pixel[order]]]
        last = np.full(height * width, -1)
        last[pixel[order]] = order  # for repeated pixels the last index, the nearest, stays
        seen = np.flatnonzero(last >= 0)
        best = last[seen]
        nearest[seen] = near[best]
        found[seen] = np.einsum("sk,ski->si", weight[best], uv[face[best]]) / near[best, None]
    return nearest, found
