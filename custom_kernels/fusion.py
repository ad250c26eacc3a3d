"""Fusion of depth pictures into a volume (Curless & Levoy 1996): where surfaces are, and their colours.

Symbols: X × Y × Z points of a regular grid; d(u) the distance along a pixel's ray to what it shows; τ the truncation.

    t = mean over views of min(1, (d − |x − o|) / τ),   where that is at least −1; rays that hit nothing count as 1
    rgb = Σ (1 − |t|)² rgb(u) / Σ (1 − |t|)²

A point that is behind surfaces in all views that see it is inside, t = −1; one that no view sees is outside, t = 1.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from custom_kernels import native

SOLID = 0.5  # opacity above which a pixel shows a surface


class DepthView(NamedTuple):
    """A picture by a pinhole camera, which looks along +z, y down."""

    rotation: Tensor  # [3, 3] world to camera
    position: Tensor  # [3]
    intrinsics: tuple[float, float, float, float]  # fx, fy, cx, cy, pixels
    rgb: Tensor  # [H, W, 3]
    depth: Tensor  # [H, W] along the rays
    opacity: Tensor  # [H, W]


class Volume:
    """The sums over views, at points low + voxel · (i, j, k)."""

    def __init__(self, low: Tensor, counts: tuple[int, int, int], voxel: float, truncation: float) -> None:
        self.low, self.counts, self.voxel, self.truncation = low.float().cpu(), counts, voxel, truncation
        self.distance, self.weight = torch.zeros(counts), torch.zeros(counts)
        self.colour = torch.zeros(*counts, 4)  # rgb and weight
        self.hidden = torch.zeros(counts, dtype=torch.uint8)

    def add(self, view: DepthView, backend: str = "auto") -> None:
        """Add a picture; backend: auto, native or reference (torch)."""
        if backend == "native" or (backend == "auto" and native.library() is not None):
            self._add_native(view)
        else:
            self._add_reference(view)

    def signed_distance(self) -> Tensor:
        """t [X, Y, Z] in [−1, 1]."""
        seen = self.weight > 0
        return torch.where(seen, self.distance / self.weight.clamp_min(1), torch.where(self.hidden > 0, -1.0, 1.0))

    def _add_native(self, view: DepthView) -> None:
        p = native.pointer
        rgb, depth, opacity = (x.float().cpu().contiguous() for x in (view.rgb, view.depth, view.opacity))
        height, width = depth.shape
        pose = (ctypes.c_float * 9)(*view.rotation.flatten().tolist()), (ctypes.c_float * 3)(*view.position.tolist())
        known = _View(*pose, *view.intrinsics, width, height, p(rgb), p(depth), p(opacity))
        counts = (ctypes.c_int64 * 3)(*self.counts)
        grid = p(self.low), ctypes.c_float(self.voxel), counts, ctypes.c_float(self.truncation)
        sums = p(self.distance), p(self.weight), p(self.colour), p(self.hidden)
        call = native.require_library().fuse_view
        call.restype = None
        call(ctypes.byref(known), *grid, *sums, ctypes.c_int(native.num_threads()))

    def _add_reference(self, view: DepthView) -> None:
        axes = [self.low[i] + self.voxel * torch.arange(n) for i, n in enumerate(self.counts)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - view.position
        p = points @ view.rotation.T
        fx, fy, cx, cy = view.intrinsics
        z = torch.where(p[..., 2] > 1e-6, p[..., 2], torch.nan)
        u, v = fx * p[..., 0] / z + cx, fy * p[..., 1] / z + cy
        height, width = view.depth.shape
        inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)  # False for NaN
        u, v = u[inside], v[inside]
        row, column = v.long(), u.long()
        away = p[inside].norm(dim=1)
        sdf = _depth_at(view, u, v, self.truncation) - away
        sdf = torch.where(view.opacity[row, column] > SOLID, sdf, self.truncation)
        t = (sdf / self.truncation).clamp(max=1)
        behind = t < -1
        self.hidden[inside] |= behind.to(torch.uint8)
        t = torch.where(behind, 0, t)
        near = torch.where(behind, 0, (1 - t.abs()) ** 2)
        self.distance[inside] += t
        self.weight[inside] += (~behind).float()
        self.colour[inside] += near[:, None] * torch.cat((view.rgb[row, column], torch.ones(len(row), 1)), 1)


def _depth_at(view: DepthView, u: Tensor, v: Tensor, truncation: float) -> Tensor:
    """The depth at pixels [S]: interpolated where the four neighbours are one surface, else the nearest one's."""
    height, width = view.depth.shape
    x, y = (u - 0.5).floor().long(), (v - 0.5).floor().long()
    whole = (x >= 0) & (y >= 0) & (x + 1 < width) & (y + 1 < height)
    xs, ys = x.clamp(0, max(width - 2, 0)), y.clamp(0, max(height - 2, 0))
    right, below = (xs + 1).clamp(max=width - 1), (ys + 1).clamp(max=height - 1)
    corners = [(ys, xs), (ys, right), (below, xs), (below, right)]
    d = torch.stack([view.depth[c] for c in corners])
    o = torch.stack([view.opacity[c] for c in corners])
    one = whole & (d.amax(0) - d.amin(0) <= truncation) & (o.amin(0) > SOLID)
    a, b = u - 0.5 - x, v - 0.5 - y
    smooth = (1 - b) * ((1 - a) * d[0] + a * d[1]) + b * ((1 - a) * d[2] + a * d[3])
    return torch.where(one, smooth, view.depth[v.long(), u.long()])


class _View(ctypes.Structure):
    """Mirrors FusionView in cpu/fusion.cpp."""

    _fields_ = (
        ("rotation", ctypes.c_float * 9),
        ("position", ctypes.c_float * 3),
        *((name, ctypes.c_float) for name in ("fx", "fy", "cx", "cy")),
        *((name, ctypes.c_int32) for name in ("width", "height")),
        *((name, ctypes.c_void_p) for name in ("rgb", "depth", "opacity")),
    )
