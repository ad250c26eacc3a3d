"""Triangles on a grid of pixels: which pixels they cover, and pictures of textured meshes.

Symbols: V vertices, F triangles; points [V, 2] and corners [F, 3, 2] are (x, y) in pixels, y down, and the centre of
pixel (row r, column c) is (c + ½, r + ½). UVs have their origin at the texture's lower left.
"""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from custom_kernels import native

CANDIDATES = 1 << 21  # triangle × pixel tests at a time
ONE = 256  # parts of a texel, to which bilinear weights are rounded


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


class Projected(NamedTuple):
    """A textured mesh as a camera sees it.

    points [V, 2] float64, in pixels; inverse [V] float64, 1 / depth, 0 behind the camera; faces [F, 3] int64,
    counter-clockwise from their front; uv [V, 2] float64; texture [h, w, 3] uint8.
    """

    points: np.ndarray
    inverse: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    texture: np.ndarray


class _Mesh(ctypes.Structure):
    """Mirrors Mesh in cpu/meshes.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("points", "inverse", "uv", "faces")),
        ("count", ctypes.c_int64),
        ("texture", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("texture_width", "texture_height")),
    )


def draw(mesh: Projected, width: int, height: int, samples: int = 1, background: int = 255) -> np.ndarray:
    """Return a picture [H, W, 3] uint8 of the mesh's colours, unlit, before a grey `background` (0 to 255).

    The mean of samples² samples a pixel: the nearest front face at each, its texture read bilinearly at its
    perspective-correct uv. Faces with a corner behind the camera are left out. In C++ where it is built, else by
    `draw_reference`, which gives the same bytes. Raises ValueError for other shapes and for faces without a vertex.
    """
    mesh = _checked(mesh)
    library = native.library()
    if library is None:
        return draw_reference(mesh, width, height, samples, background)
    scaled = np.ascontiguousarray(mesh.points * samples)
    at = [x.ctypes.data for x in (scaled, mesh.inverse, mesh.uv, mesh.faces)]
    sizes = mesh.texture.shape[1::-1]
    structure = _Mesh(*at, len(mesh.faces), mesh.texture.ctypes.data, *sizes)
    picture = np.empty((height, width, 3), np.uint8)
    library.draw_mesh(
        ctypes.byref(structure), *map(ctypes.c_int64, (width, height, samples, background)),
        ctypes.c_void_p(picture.ctypes.data), ctypes.c_int(native.num_threads()),
    )  # fmt: skip
    return picture


def draw_reference(mesh: Projected, width: int, height: int, samples: int = 1, background: int = 255) -> np.ndarray:
    """`draw` in numpy."""
    columns, rows = width * samples, height * samples
    corners = mesh.points[mesh.faces] * samples
    edges = corners[:, 1:] - corners[:, :1]
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    front = (area < 0) & np.isfinite(area) & (mesh.inverse[mesh.faces] > 0).all(1)
    faces = mesh.faces[front]
    nearest, uv = np.zeros(rows * columns), np.zeros((rows * columns, 2))
    for pixel, face, bary in rasterise(corners[front], columns, rows):
        share = bary * mesh.inverse[faces[face]]  # attributes / depth are linear on the screen
        near = share[:, 0] + share[:, 1] + share[:, 2]
        order = np.lexsort((-face, near))  # the nearest last; of equally near ones the first
        order = order[near[order] > nearest[pixel[order]]]
        last = np.full(rows * columns, -1)
        last[pixel[order]] = order
        seen = np.flatnonzero(last >= 0)
        best = last[seen]
        nearest[seen] = near[best]
        weighted = share[best, :, None] * mesh.uv[faces[face[best]]]
        uv[seen] = (weighted[:, 0] + weighted[:, 1] + weighted[:, 2]) / near[best, None]
    colour = np.full((rows * columns, 3), background * ONE**2, np.int64)
    colour[nearest > 0] = _bilinear(mesh.texture, uv[nearest > 0])
    total = colour.reshape(height, samples, width, samples, 3).sum((1, 3))
    whole = ONE**2 * samples**2
    return ((2 * total + whole) // (2 * whole)).astype(np.uint8)


def _bilinear(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Colours [S, 3] int64, in 1 / ONE² of a level, of a texture [h, w, 3] at uv [S, 2]."""
    height, width = texture.shape[:2]
    x, y = (
        np.floor(np.clip(at - 0.5, 0.0, size - 1) * ONE + 0.5).astype(np.int64)
        for at, size in ((uv[:, 0] * width, width), ((1 - uv[:, 1]) * height, height))
    )
    (left, fx), (top, fy) = np.divmod(x, ONE), np.divmod(y, ONE)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy, texture = fx[:, None], fy[:, None], texture.astype(np.int64)
    above = (ONE - fx) * texture[top, left] + fx * texture[top, right]
    below = (ONE - fx) * texture[bottom, left] + fx * texture[bottom, right]
    return (ONE - fy) * above + fy * below


def _checked(mesh: Projected) -> Projected:
    """The mesh with contiguous arrays of the right kinds."""
    kinds = (np.float64, np.float64, np.int64, np.float64, np.uint8)
    mesh = Projected(*(np.ascontiguousarray(x, kind) for x, kind in zip(mesh, kinds, strict=True)))
    count = len(mesh.points)
    shapes = mesh.points.shape == mesh.uv.shape == (count, 2) and mesh.inverse.shape == (count,)
    if not shapes or mesh.faces.shape[1:] != (3,) or mesh.texture.shape[2:] != (3,) or not mesh.texture.size:
        raise ValueError(f"arrays of a mesh do not fit together: {[x.shape for x in mesh]}")
    if mesh.faces.size and not 0 <= mesh.faces.min() <= mesh.faces.max() < count:
        raise ValueError(f"faces name vertices {mesh.faces.min()} to {mesh.faces.max()} of {count}")
    return mesh
