"""Equirectangular (360°) pictures cut into pinhole views: the six faces of a cube, each a little wider than its face.

A panorama of W x W/2 pixels, (u, v) right and down, shows in its camera's OpenGL axes (x right, y up, z backwards)

    d = (cos b sin a, sin b, -cos b cos a),   a = 2 pi (u / W - 1/2),   b = pi (1/2 - v / H)

so that its middle looks along -z, as nerfstudio has it.
"""

import math
from dataclasses import replace

import numpy as np

from csd3d.datasets.listing import Frame
from csd3d.errors import InputError

FOV_RAD = math.radians(95)  # wider than a face's 90 degrees, so that neighbours overlap
NAMES = ("front", "right", "back", "left", "up", "down")


def face_rotations() -> np.ndarray:
    """[6, 3, 3] from the axes of each face's camera to the panorama's; `NAMES` is their order."""
    turns = []
    for k in range(4):
        a = -k * math.pi / 2
        turns.append([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    turns += [[[1, 0, 0], [0, 0, -s], [0, s, 0]] for s in (1, -1)]
    return np.round(np.array(turns, dtype=np.float64))


def cut_frame(frame: Frame) -> list[Frame]:
    """The six pinhole frames of a panorama's frame. They share its file; `Frame.cut` tells them apart."""
    frames = []
    for k, rotation in enumerate(face_rotations()):
        pose = frame.pose.copy()
        pose[:3, :3] = pose[:3, :3] @ rotation
        optics = {"focal": (None, None), "angle": (FOV_RAD, FOV_RAD), "centre": (None, None)}
        frames.append(replace(frame, name=f"{frame.name} {NAMES[k]}", pose=pose, cut=k, **optics))
    return frames


def face_side(width: int, height: int, where: str) -> int:
    """Pixels a side of a face, as fine as the panorama is along its horizon; InputError unless it is 2:1."""
    if abs(width - 2 * height) > 2 or width < 16:
        raise InputError(f"{where}: {width}x{height}; expected an equirectangular picture, twice as wide as high")
    return max(2, round(width / math.pi * math.tan(FOV_RAD / 2)))


def cut_pixels(panorama: np.ndarray, cut: int, side: int) -> np.ndarray:
    """Face `cut` [side, side, C] of a panorama [H, W, C]: bilinear, closed across the left and right edge."""
    height, width = panorama.shape[:2]
    x = (np.arange(side) + 0.5) / side * 2 - 1
    right, down = np.meshgrid(x, x, indexing="xy")
    reach = math.tan(FOV_RAD / 2)
    d = np.stack((reach * right, -reach * down, -np.ones_like(right)), axis=-1) @ face_rotations()[cut].T
    u = (np.arctan2(d[..., 0], -d[..., 2]) / (2 * math.pi) + 0.5) * width - 0.5
    v = (0.5 - np.arctan2(d[..., 1], np.hypot(d[..., 0], d[..., 2])) / math.pi) * height - 0.5
    v = v.clip(0, height - 1)
    left, top = np.floor(u).astype(int), np.floor(v).astype(int).clip(max=height - 2)
    fraction_u, fraction_v = (u - left)[..., None], (v - top)[..., None]
    rows = [
        panorama[row, left % width] * (1 - fraction_u) + panorama[row, (left + 1) % width] * fraction_u
        for row in (top, top + 1)
    ]
    return (rows[0] * (1 - fraction_v) + rows[1] * fraction_v).astype(panorama.dtype)
