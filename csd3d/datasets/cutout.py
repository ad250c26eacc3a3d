"""Cutting the object out of one picture: by its transparency, or from a plain background.

Symbols: mask [S, S], the object's share of each pixel; colour [S, S, 3], what it shows, times mask; float32 in [0, 1].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from csd3d.datasets.images import MAX_PIXELS, area_resize
from csd3d.errors import InputError
from csd3d.media import read_image

WORKING_SIDE = 1024  # of the longer side, while the object is cut out
LEAST_SHARE, MOST_SHARE = 2e-3, 0.98  # of the picture that the object may cover
LEAST_SIDE = 16  # pixels of the object's longer side
BORDER = 0.02  # width of the border by which a background is judged, as a share of the picture
PLAIN_SHARE = 0.7  # of the border's pixels must have the background's colour
HOLE = 5e-3  # holes that are smaller, as a share of the object, are specks in it


@dataclass(frozen=True)
class Cutout:
    """An object without its background, see the module."""

    colour: np.ndarray
    mask: np.ndarray


def read_cutout(path: Path, side: int, fill: float, tolerance: float) -> Cutout:
    """Cut the object out of a picture file and put it in the middle of a square of `side` pixels.

    The longer side of the object's box takes the share `fill` of the square. tolerance: the largest difference of a
    channel in which a pixel of the background differs from its colour. Raises InputError for a picture that cannot be
    read, has no foreground, or has neither transparency nor a plain background.
    """
    picture = read_image(path, MAX_PIXELS)
    cut = picture.alpha is not None and bool(picture.alpha.min() < 0.99)
    alpha = picture.alpha if cut else np.ones(picture.rgb.shape[:2], np.float32)
    found = np.concatenate((picture.rgb * alpha[:, :, None], alpha[:, :, None]), 2)
    height, width = alpha.shape
    if (longer := max(height, width)) > WORKING_SIDE:
        size = (max(1, round(length * WORKING_SIDE / longer)) for length in (width, height))
        found = area_resize(found, *size)
    if not cut:
        mask = plain_background_cut(found[:, :, :3], tolerance, str(path))
        found = np.concatenate((found[:, :, :3], np.ones_like(mask)[:, :, None]), 2) * mask[:, :, None]
    check_foreground(found[:, :, 3], str(path), cut)
    framed = centred(found, side, fill)
    return Cutout(np.ascontiguousarray(framed[:, :, :3]), np.ascontiguousarray(framed[:, :, 3]))


def check_foreground(mask: np.ndarray, name: str, transparent: bool) -> None:
    """Raise InputError unless a mask [H, W] shows an object, with some background around it."""
    share, (rows, columns) = float(mask.mean()), np.nonzero(mask > 0.5)
    if share > MOST_SHARE:
        raise InputError(f"{name}: all of it is the object; give a picture with some background around the object")
    largest = max(np.ptp(rows), np.ptp(columns)) + 1 if len(rows) else 0
    if share < LEAST_SHARE or largest < LEAST_SIDE:
        why = "is transparent" if transparent else "has the colour of its border"
        raise InputError(
            f"{name}: without a foreground: (nearly) all of it {why}; give a picture of one object, of at least "
            f"{LEAST_SIDE} pixels, that is cut out (a PNG with transparency) or before a plain background"
        )


def plain_background_cut(rgb: np.ndarray, tolerance: float, name: str = "picture") -> np.ndarray:
    """Mask [H, W] of the object before a plain background, 0 or 1: the largest piece of another colour than the border.

    rgb [H, W, 3]. Holes stay (a mug's handle has one) unless they are specks. Raises InputError if the border has no
    one colour.
    """
    width = max(1, round(BORDER * min(rgb.shape[:2])))
    inside = np.zeros(rgb.shape[:2], bool)
    inside[width:-width, width:-width] = True
    colour = np.median(rgb[~inside], 0)
    differs = np.abs(rgb - colour).max(2) > tolerance
    if (plain := 1 - differs[~inside].mean()) < PLAIN_SHARE:
        raise InputError(
            f"{name}: its background is not plain: {plain:.0%} of the border has one colour; give a picture with the "
            "object cut out (a PNG with transparency), or raise front.tolerance"
        )
    pieces, count = ndimage.label(differs)
    if not count:
        return differs.astype(np.float32)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    mask = pieces == sizes.argmax()
    holes, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    area = np.bincount(holes.ravel())
    return (mask | ((holes > 0) & (area[holes] < HOLE * mask.sum()))).astype(np.float32)


def centred(picture: np.ndarray, side: int, fill: float) -> np.ndarray:
    """A picture [H, W, 4], its mask last, as a square [side, side, 4] with the object's box in the middle."""
    rows, columns = np.nonzero(picture[:, :, 3] > 0.5)
    low, high = np.array([rows.min(), columns.min()]), np.array([rows.max(), columns.max()]) + 1
    length = max(1, round(float((high - low).max()) / fill))
    first = np.round((low + high) / 2 - length / 2).astype(int)
    square = np.zeros((length, length, 4), np.float32)
    start, end = np.maximum(first, 0), np.minimum(first + length, picture.shape[:2])
    (y0, x0), (y1, x1) = start - first, end - first
    square[y0:y1, x0:x1] = picture[start[0] : end[0], start[1] : end[1]]
    return area_resize(square, side, side)
