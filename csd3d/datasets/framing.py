"""Cameras from listed frames: picture sizes, intrinsics, and a check that the lens distortion can be inverted.

A capture has one raster, on which its pictures are placed. Pictures of one size fill it. Pictures of several sizes
are resized to about the same number of pixels and padded to the largest width and height among them.
"""

import logging
import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csd3d.cameras import Cameras
from csd3d.datasets.images import image_size, turned_size
from csd3d.datasets.listing import Frame
from csd3d.datasets.panoramas import face_side
from csd3d.errors import InputError

log = logging.getLogger("csd3d")

SAME_ASPECT = 0.02  # most relative difference of two sides' ratios; rounding takes up to 0.5 / side
LEAST_VIEW_DEG, MOST_VIEW_DEG = 1.0, 175.0  # across the picture, of a camera without a fisheye lens
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Raster:
    """The pixel grid of a picture: as stored, or `turned` by the EXIF orientation."""

    width: int
    height: int
    turned: bool
    stated: Size | None = None  # the size that the intrinsics refer to, if the picture was resized since


@dataclass(frozen=True)
class Place:
    """Where a picture is on the capture's raster, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Layout:
    """The capture's raster, and for each frame its picture's own raster and its place."""

    width: int
    height: int
    rasters: list[Raster]
    places: list[Place]

    @property
    def padded(self) -> bool:
        """Whether some picture does not fill the raster."""
        return any((place.width, place.height) != (self.width, self.height) for place in self.places)


def lay_out(frames: list[Frame], max_pixels: int, downscale: float) -> Layout:
    """Find the sizes of all pictures from their headers, and place them, made smaller by `downscale`, on one raster.

    Raises InputError for a picture whose size contradicts its intrinsics or its mask.
    """
    rasters = [_raster(frame, max_pixels) for frame in frames]
    _tell_resized(frames, rasters)
    full = [(raster.width, raster.height) for raster in rasters]
    areas = [width * height for width, height in full]
    shrink = [downscale] * len(full)
    if len(set(full)) > 1:
        usual = statistics.median_low(areas)
        shrink = [downscale * math.sqrt(area / usual) for area in areas]
    sizes = [tuple(max(1, round(side / by)) for side in size) for size, by in zip(full, shrink, strict=True)]
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    places = [Place((width - w) // 2, (height - h) // 2, w, h) for w, h in sizes]
    layout = Layout(width, height, rasters, places)
    if layout.padded:
        told = f"pictures of {len(set(full))} sizes, {_shown(min(full))} to {_shown(max(full))}"
        log.info("%s: each is resized and padded to %s; the padding is not learned from", told, _shown((width, height)))
    return layout


def _shown(size: tuple[int | None, int | None]) -> str:
    return "x".join("?" if side is None else str(side) for side in size)


def _raster(frame: Frame, max_pixels: int) -> Raster:
    """The stored size if the JSON's w and h agree with it, else the displayed size if that one agrees.

    If neither does, the picture may have been resized since the JSON was written: the first of the same aspect.
    """
    stored = image_size(frame.file, max_pixels)
    turned = turned_size(frame.file)
    found = next((size for size in (stored, turned) if size and _agrees(size, frame.size)), None)
    stated = None
    if found is None:
        found = next((size for size in (stored, turned) if size and _resized(size, frame.size)), None)
        stated = frame.size
    if found is None:
        size = _shown(turned or stored)
        raise InputError(f"{frame.where}: {frame.file} is displayed as {size}; its w and h say {_shown(frame.size)}")
    if frame.mask is not None:
        mask = image_size(frame.mask, max_pixels)
        if mask != found and not _same_aspect(mask, found):
            raise InputError(
                f"{frame.where}.mask_path: {frame.mask} is {_shown(mask)}, its picture {_shown(found)}; expected that "
                "size, or another of the same aspect"
            )
    if frame.cut is not None:
        side = face_side(*found, f"{frame.where}: {frame.file}")
        return Raster(side, side, found != stored)
    return Raster(*found, turned=found != stored, stated=stated)


def _agrees(size: Size, stated: tuple[int | None, int | None]) -> bool:
    return all(expected is None or side == expected for side, expected in zip(size, stated, strict=True))


def _resized(size: Size, stated: tuple[int | None, int | None]) -> bool:
    """Whether a picture of `stated` size, shrunk or enlarged, can have become `size`."""
    if None in stated:
        return False
    larger = [side > expected for side, expected in zip(size, stated, strict=True)]
    differ = all(side != expected for side, expected in zip(size, stated, strict=True))
    return differ and larger[0] == larger[1] and _same_aspect(size, stated)


def _same_aspect(size: Size, other: Size) -> bool:
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= SAME_ASPECT


def _tell_resized(frames: list[Frame], rasters: list[Raster]) -> None:
    resized = [(frame, raster) for frame, raster in zip(frames, rasters, strict=True) if raster.stated is not None]
    if resized:
        frame, raster = resized[0]
        told = (
            f"{frame.where}: {frame.file} is {_shown((raster.width, raster.height))}, w and h say {_shown(frame.size)}"
        )
        log.warning("%s: intrinsics are scaled to the picture, as are those of %d in all", told, len(resized))


def frame_cameras(frames: list[Frame], layout: Layout, camera_to_world: Tensor) -> Cameras:
    """Cameras of the frames on the layout's raster, posed by camera_to_world [B, 3, 4]; InputError for bad optics."""
    fisheye = [frame.fisheye for frame in frames]
    sizes = [raster.stated or (raster.width, raster.height) for raster in layout.rasters]
    rows = [_pinhole(frame, *size) for frame, size in zip(frames, sizes, strict=True)]
    values = torch.tensor(rows, dtype=torch.float32)
    _warn_of_view(frames, rows, sizes)
    longest = max(len(frame.lens) for frame in frames)
    lenses = torch.tensor([frame.lens + (0.0,) * (longest - len(frame.lens)) for frame in frames], dtype=torch.float32)
    cameras = Cameras(
        camera_to_world,
        *values.unbind(dim=1),
        width=layout.width,
        height=layout.height,
        distortion=lenses if lenses.any() else None,
        fisheye=fisheye[0] if len(set(fisheye)) == 1 else torch.tensor(fisheye),
    )
    if lenses.any():
        _check_lenses(cameras, frames, sizes)
    scales = torch.tensor(
        [(place.width / w, place.height / h) for place, (w, h) in zip(layout.places, sizes, strict=True)]
    )
    left, top = torch.tensor([(place.left, place.top) for place in layout.places]).unbind(1)
    (sx, sy), (fx, fy, cx, cy) = scales.unbind(1), values.unbind(1)
    return replace(cameras, fx=fx * sx, fy=fy * sy, cx=cx * sx + left, cy=cy * sy + top)


def _warn_of_view(frames: list[Frame], rows: list[tuple[float, float, float, float]], sizes: list[Size]) -> None:
    """Warn of an angle of view that no camera has: w, h or the focal length is wrong then."""
    for frame, row, size in zip(frames, rows, sizes, strict=True):
        angle = math.degrees(2 * math.atan(size[0] / (2 * row[0])))
        if not LEAST_VIEW_DEG <= angle <= MOST_VIEW_DEG and not frame.fisheye:
            where = f"{frame.where}: focal length {row[0]:.4g} for {size[0]} pixels"
            log.warning("%s is an angle of view of %.3g degrees: check w, h and fl_x or camera_angle_x", where, angle)
            return


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


def _check_lenses(cameras: Cameras, frames: list[Frame], sizes: list[Size]) -> None:
    """Raise InputError if the distortion can't be inverted over most of a picture; warn if it can't near its edge.

    cameras: with the intrinsics of pictures of `sizes`.
    """
    worst = 0.0
    for i, (frame, (width, height)) in enumerate(zip(frames, sizes, strict=True)):
        u, v = torch.meshgrid(torch.linspace(0, width, 9), torch.linspace(0, height, 9), indexing="xy")
        grid = torch.stack((u, v), dim=-1).reshape(-1, 2)
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
