"""Render batches of scenes, each image with its own scene and camera.

The compiled kernel (`custom_kernels/cpu/world.cpp`) uses all cores; `csd3d.world.reference` does the same in torch.
Cameras here are rows of 16 numbers: camera-to-world 3x4 (OpenGL axes), fx, fy, cx, cy in pixels.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csd3d.world.scene import Arrays, Scene, compile_scene
from custom_kernels.native import library, num_threads

FAR = 100.0  # depth of rays that hit nothing


@dataclass(frozen=True)
class Pictures:
    """A batch of renders, float32: `rgb`, `albedo` [B,H,W,3] in [0,1]; `depth` [B,H,W] in world units along the ray,
    least of a pixel's samples (`FAR`: background); `mask` [B,H,W], the share of each pixel that the object covers."""

    rgb: np.ndarray
    albedo: np.ndarray
    depth: np.ndarray
    mask: np.ndarray


def render(scenes: Sequence[Scene], cameras: np.ndarray, width: int, height: int, samples: int = 2) -> Pictures:
    """Render scene i by camera i (`cameras` [B,16]) with `samples`² rays a pixel."""
    return render_arrays([compile_scene(scene) for scene in scenes], cameras, width, height, samples)


def render_arrays(arrays: Sequence[Arrays], cameras: np.ndarray, width: int, height: int, samples: int = 2) -> Pictures:
    """`render` for compiled scenes."""
    if len(arrays) != len(cameras) or cameras.shape[1:] != (16,):
        raise ValueError(f"need one camera row of 16 a scene, got {len(arrays)} scenes and cameras {cameras.shape}")
    lib = library()
    if lib is None:
        from csd3d.world.reference import render_reference

        return render_reference(arrays, cameras, width, height, samples)
    return _render_native(lib, arrays, cameras, width, height, samples)


def _render_native(
    lib: ctypes.CDLL, arrays: Sequence[Arrays], cameras: np.ndarray, width: int, height: int, samples: int
) -> Pictures:
    def pack(name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = [getattr(a, name) for a in arrays]
        first = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        return first, np.ascontiguousarray(np.concatenate(rows), np.float32)

    count = len(arrays)
    first, primitives = pack("primitives")
    first_material, materials = pack("materials")
    world = np.stack([a.globals for a in arrays])
    rows = np.ascontiguousarray(cameras, np.float32)
    shape = (count, height, width)
    out = Pictures(*(np.empty(s, np.float32) for s in ((*shape, 3), (*shape, 3), shape, shape)))
    address = [a.ctypes.data_as(ctypes.c_void_p) for a in (first, primitives, first_material, materials, world, rows)]
    result = [a.ctypes.data_as(ctypes.c_void_p) for a in (out.rgb, out.albedo, out.depth, out.mask)]
    sizes = (ctypes.c_int(width), ctypes.c_int(height), ctypes.c_int(samples))
    lib.world_render(ctypes.c_int64(count), *address, *sizes, *result, ctypes.c_int(num_threads()))
    return out


def camera_row(
    azimuth_deg: float, elevation_deg: float, distance: float, fov_deg: float, size: int, target=(0.0, 0.0, 0.0)
) -> np.ndarray:
    """A camera [16] on a sphere around `target` that looks at it; square pictures of `size` pixels."""
    a, e = math.radians(azimuth_deg), math.radians(elevation_deg)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    pose = np.stack([right, np.cross(back, right), back, np.asarray(target) + distance * back], axis=1)
    focal = size / 2 / math.tan(math.radians(fov_deg) / 2)
    return np.concatenate([pose.ravel(), [focal, focal, size / 2, size / 2]]).astype(np.float32)
