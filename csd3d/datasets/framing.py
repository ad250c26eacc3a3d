"""Cameras from listed frames: picture sizes, intrinsics, and a check that the lens distortion can be inverted."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets.images import image_size, turned_size
from csd3d.datasets.listing import Frame
from csd3d.datasets.panoramas import face_side
from csd3d.errors import InputError

log = logging.getLogger("csd3d")


@dataclass(frozen=True)
class Raster:
    """The pixel grid that a frame's intrinsics refer to: as stored, or `turned` by the EXIF orientation."""

    width: int
    height: int
    turned: bool


def common_raster(frames: list[Frame], max_pixels: int) -> tuple[int, int, list[Raster]]:
    """Width and height of all pictures, and the raster of each, from their headers; InputError if sizes differ."""
    rasters = [_raster(frame, max_pixels) for frame in frames]
    first = rasters[0]
    for frame, raster in zip(frames, rasters, strict=True):
        if (raster.width, raster.height) != (first.width, first.height):
            size = f"{raster.width}x{raster.height}, the first is {first.width}x{first.height}"
            raise InputError(f"{frame.where}: {frame.file} is {size}; expected pictures of one size")
    return first.width, first.height, rasters


def _raster(frame: Frame, max_pixels: int) -> Raster:
    """The stored size if the JSON's w and h agree with it, else the displayed size if that one agrees."""
    stored = image_size(frame.file, max_pixels)
    turned = None if _agrees(stored, frame.size) else turned_size(frame.file)
    width, height = turned or stored
    if not _agrees((width, height), frame.size):
        stated = "x".join("?" if side is None else str(side) for side in frame.size)
        raise InputError(f"{frame.where}: {frame.file} is displayed as {width}x{height}; its w and h say {stated}")
    raster = Raster(width, height, turned=turned is not None)
    if frame.mask is not None and image_size(frame.mask, max_pixels) != (raster.width, raster.height):
        raise InputError(f"{frame.where}.mask_path: {frame.mask} is not {raster.width}x{raster.height} as its picture")
    if frame.cut is not None:
        side = face_side(raster.width, raster.height, f"{frame.where}: {frame.file}")
        return Raster(side, side, raster.turned)
    return raster


def _agrees(size: tuple[int, int], stated: tuple[int | None, int | None]) -> bool:
    return all(expected is None or side == expected for side, expected in zip(size, stated, strict=True))


def frame_cameras(frames: list[Frame], width: int, height: int, camera_to_world: Tensor) -> Cameras:
    """Cameras of the frames on their full raster, posed by camera_to_world [B, 3, 4]; InputError for bad optics."""
    if len({frame.fisheye for frame in frames}) > 1:
        raise InputError(f"{frames[0].where}.camera_model: fisheye and other lenses in one capture; expected one kind")
    values = torch.tensor([_pinhole(frame, width, height) for frame in frames], dtype=torch.float32)
    longest = max(len(frame.lens) for frame in frames)
    lenses = torch.tensor([frame.lens + (0.0,) * (longest - len(frame.lens)) for frame in frames], dtype=torch.float32)
    cameras = Cameras(
        camera_to_world,
        *values.unbind(dim=1),
        width=width,
        height=height,
        distortion=lenses if lenses.any() else None,
        fisheye=frames[0].fisheye,
    )
    if lenses.any():
        _check_lenses(cameras, frames)
    return cameras


def _pinhole(frame: Frame, width: int, height: int) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels; f = side / (2 tan(angle / 2)) for an angle; cx, cy default to the middle."""
    fx, fy = (
        focal if focal is not None or angle is None else side / (2 * math.tan(angle / 2))
        for focal, angle, side in zip(frame.focal, frame.angle, (width, height), strict=True)
    )
    if fx is None and fy is None:
        raise InputError(
            f"{frame.where}: has no focal length; expected fl_x or camera_angle_x, there or for all frames"
        )
    cx, cy = (side / 2 if c is None else c for c, side in zip(frame.centre, (width, height), strict=True))
    if not (-width <= cx <= 2 * width and -height <= cy <= 2 * height):
        raise InputError(f"{frame.where}: cx, cy = {cx:g}, {cy:g}; expected a point in its {width}x{height} pixels")
    return fx or fy, fy or fx, cx, cy


def _check_lenses(cameras: Cameras, frames: list[Frame]) -> None:
    """Raise InputError if the distortion can't be inverted over most of the picture; warn if it can't near the edge."""
    u, v = torch.meshgrid(torch.linspace(0, cameras.width, 9), torch.linspace(0, cameras.height, 9), indexing="xy")
    grid = torch.stack((u, v), dim=-1).reshape(-1, 2)
    worst = 0.0
    for i, frame in enumerate(frames):
        rays_o, rays_d = cameras.rays(torch.full((len(grid),), i), grid)
        found, _ = cameras.project(rays_o + rays_d, i)
        lost = 1 - ((found - grid).norm(dim=-1) < 0.5).float().mean().item()  # NaN counts as lost
        if lost > 0.5:
            raise InputError(f"{frame.where}: its lens {frame.lens} can't be undone over most of the picture")
        worst = max(worst, lost)
    if worst > 0:
        log.warning(
            "the lens can't be undone at %.0f %% of a picture, near its edge: those rays are approximate", 100 * worst
        )
